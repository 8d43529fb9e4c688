"""The random number generators of a training run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Randomness:
    """Generators for the data's order and for augmentation, and torch's global one, which dropout uses.

    As a context manager, it seeds torch's global generator inside and restores it afterwards.

    Args:
        seed: of all generators.
        device: the device that dropout runs on.
        rank: of this process: all processes share the order; each has its own augmentation and dropout.
    """

    def __init__(self, seed: int, device: torch.device, rank: int = 0) -> None:
        self.seed = seed + rank
        self.device = device
        # two generators, so that the order does not depend on the augmentation
        self.order = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 1 + rank)
        self._generators = {"order": self.order, "noise": self.noise}
        self._fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> Randomness:
        self._fork.__enter__()
        torch.manual_seed(self.seed)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)

    def track(self, generator: torch.Generator | None) -> None:
        """Include the training data's own generator, if it has one, in the saved state."""
        if generator is not None:
            self._generators["data"] = generator

    def state(self) -> dict[str, Tensor]:
        """The state of all generators, by name."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        states["torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the output of `state`."""
        for name, generator in self._generators.items():
            generator.set_state(state[name])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
