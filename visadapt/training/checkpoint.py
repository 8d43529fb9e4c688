"""Checkpoints: a training that was stopped goes on where it was, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visadapt.errors import VisadaptError
from visadapt.files import write_tensors
from visadapt.training.history import Epoch
from visadapt.training.loop import Loop, Run
from visadapt.training.signature import unlike
from visadapt.typed import fits, from_json

FORMAT = 1
_SCHEDULE: dict[str, Any] = {"last_epoch": int, "_step_count": int, "_last_lr": list[float]}


class Checkpoint:
    """A file with everything that a training needs to go on: safetensors, and JSON in its header.

    Args:
        path: of the file; it need not be there yet.
        identity: what the training is of.

    Raises:
        VisadaptError: there is no such folder; the file is no checkpoint, or one of another training (what differs is
            named).
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity
        if not self.path.parent.is_dir():
            raise VisadaptError(f"no folder {self.path.parent} to keep a checkpoint in")
        self._found = self._read() if self.path.exists() else None

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = json.loads((file.metadata() or {}).get("visadapt_training", "{}"))
                # copied: a file's tensors lie at odd addresses, where torch picks kernels that round differently
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise VisadaptError(f"{self.path} is no checkpoint of a training, or not a whole one ({error})") from error
        if not isinstance(notes, dict) or notes.get("format") != FORMAT:
            raise VisadaptError(
                f"{self.path} is no checkpoint of a training that this version of visadapt can go on with"
            )
        try:
            # typed, and no more than is listed here: what is in a file must not choose attributes
            epochs = [from_json(Epoch, epoch) for epoch in notes["run"]["epochs"]]
            run = from_json(Run, {**notes["run"], "epochs": epochs})
            schedule = {key: notes["schedule"][key] for key in _SCHEDULE}
            for key, hint in _SCHEDULE.items():
                if not fits(schedule[key], hint):
                    raise TypeError(f"{key} must be {hint}, got {schedule[key]!r:.60}")
            notes = {"identity": dict(notes["identity"]), "run": run, "schedule": schedule}
        except (KeyError, TypeError, ValueError) as error:
            raise VisadaptError(f"{self.path} is not a whole checkpoint of a training run: {error}") from error
        others = unlike(notes["identity"], self.identity)
        if others:
            raise VisadaptError(f"{self.path} is the checkpoint of another training: {others}")
        return notes, tensors

    def begin(self, loop: Loop) -> None:
        """Brings a training to where the file was written; without a file, writes where it is.

        So what is drawn before the first step is in the file as well, and a folder that cannot be written to is found
        before anything is computed.
        """
        if self._found is None:
            self.write(loop)
            return
        notes, tensors = self._found
        self._found = None

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}:"): t for key, t in tensors.items() if key.startswith(f"{name}:")}

        if len(notes["schedule"]["_last_lr"]) != len(loop.optimiser.param_groups):
            raise VisadaptError(f"{self.path} is not a whole checkpoint of a training run: it has other learning rates")
        loop.run = notes["run"]
        loop.trained.restore(part("now"))
        loop.kept = part("kept")
        state = loop.optimiser.state_dict()
        moved = [p for group in loop.optimiser.param_groups for p in group["params"]]
        for key, value in part("optimiser").items():
            index, slot = key.split(".")
            # laid out in memory as the parameter is
            like = value if value.ndim == 0 else torch.empty_like(moved[int(index)]).copy_(value)
            state["state"].setdefault(int(index), {})[slot] = like
        for group, rate in zip(state["param_groups"], notes["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        loop.optimiser.load_state_dict(state)
        loop.schedule.load_state_dict({**loop.schedule.state_dict(), **notes["schedule"]})
        # copied: torch crashes on a state that is a row of a larger tensor
        own = loop.engine.rank
        loop.began, here = ({k: v[own].clone() for k, v in part(name).items()} for name in ("began", "here"))
        loop.random.restore(here)

    def write(self, loop: Loop) -> None:
        """Replaces the file, atomically, by one that says where a training is."""
        engine = loop.engine
        # each process draws its own
        drawn = {
            name: {k: engine.gather(engine.place(v[None])) for k, v in state.items()}
            for name, state in (("began", loop.began), ("here", loop.random.state()))
        }
        if engine.rank != 0:
            return
        slots = {
            f"{index}.{slot}": value
            for index, own in loop.optimiser.state_dict()["state"].items()
            for slot, value in own.items()
            if isinstance(value, Tensor)
        }
        parts = {"now": loop.trained.snapshot(), "kept": loop.kept, "optimiser": slots, **drawn}
        tensors = {
            f"{name}:{key}": t.detach().cpu().contiguous() for name, part in parts.items() for key, t in part.items()
        }
        notes = {
            "format": FORMAT,
            "identity": self.identity,
            "run": dataclasses.asdict(loop.run),
            "schedule": loop.schedule.state_dict(),
        }
        write_tensors(self.path, tensors, {"visadapt_training": json.dumps(notes)})
