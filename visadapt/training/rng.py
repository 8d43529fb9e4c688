"""The random numbers of one training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Randomness:
    """Generators for the order and the augmentation, and torch's own numbers, which dropout draws.

    As a context: torch's own follow from the seed inside, and are outside as they were.

    Args:
        seed: of all of them.
        device: that dropout is computed on.
        rank: of this process: the order is that of all processes, noise and dropout are its own.
    """

    def __init__(self, seed: int, device: torch.device, rank: int = 0) -> None:
        self.seed = seed + rank
        self.device = device
        # one generator each: the order does not change with the augmentation
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

    def follow(self, generator: torch.Generator | None) -> None:
        """Keeps in mind where a generator is that the training data brings, if it brings one."""
        if generator is not None:
            self._generators["data"] = generator

    def state(self) -> dict[str, Tensor]:
        """Where all of them are."""
        found = {name: generator.get_state() for name, generator in self._generators.items()}
        found["torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where they were."""
        for name, generator in self._generators.items():
            generator.set_state(state[name])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
