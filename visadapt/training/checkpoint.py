"""Checkpoints: an interrupted training run resumes with bit-identical results."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.errors import VisadaptError
from visadapt.tensor_file import read_described, write_described
from visadapt.training.history import Epoch
from visadapt.training.loop import Loop, Run
from visadapt.training.recipe import EARLIER
from visadapt.training.saved_state import SCHEDULE, SavedState
from visadapt.training.signature import unlike
from visadapt.typed import fits, from_json

FORMAT = 1
KIND = "visadapt_training"


class Checkpoint:
    """A file with everything needed to resume a training run: safetensors, with JSON in its header.

    Args:
        path: of the file; it may not exist yet.
        identity: of the training run; see `visadapt.training.signature.identity`.

    Raises:
        VisadaptError: the folder does not exist; the file is not a checkpoint, or one of another training run (the
            message names what differs).
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity
        if not os.path.isdir(self.path.parent):
            raise VisadaptError(f"no folder {str(self.path.parent)!r} to write the checkpoint {self.path.name} to")
        self._saved = self._read() if os.path.exists(self.path) else None

    def _read(self) -> SavedState:
        content = read_described(self.path, KIND, "checkpoint of a training run")
        # cloned: a file's tensors may be unaligned, and torch's kernels for unaligned memory round differently
        notes, tensors = content.description, {key: tensor.clone() for key, tensor in content.tensors.items()}
        if not isinstance(notes, dict) or notes.get("format") != FORMAT:
            raise VisadaptError(
                f"{self.path} is not a checkpoint of a training run that this version of visadapt can resume"
            )
        try:
            # typed, and no more than is listed here: what is in a file must not choose attributes
            epochs = [from_json(Epoch, epoch) for epoch in notes["run"]["epochs"]]
            run = from_json(Run, {**notes["run"], "epochs": epochs})
            schedule = {key: notes["schedule"][key] for key in SCHEDULE}
            for key, hint in SCHEDULE.items():
                if not fits(schedule[key], hint):
                    raise TypeError(f"{key} must be {hint}, got {schedule[key]!r:.60}")
            identity = notes["identity"]
            if not isinstance(identity, dict):
                raise TypeError(f"identity must be an object, got {identity!r:.60}")
        except (KeyError, TypeError, ValueError) as error:
            raise VisadaptError(f"{self.path} is not a whole checkpoint of a training run: {error}") from error
        changes = unlike(self._completed(identity), self.identity)
        if changes:
            raise VisadaptError(f"{self.path} is the checkpoint of another training run: {changes}")
        return SavedState(run, schedule, tensors)

    def _completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The identity in a file, with what earlier versions did not write because they had no choice."""
        recipe, ours = saved.get("recipe"), self.identity.get("recipe")
        if not isinstance(recipe, dict) or not isinstance(ours, dict):
            return saved
        # how the head started does not matter any more: the file holds what came of it
        return {**saved, "recipe": {**EARLIER, "head_first": ours.get("head_first"), **recipe}}

    @property
    def resumes(self) -> bool:
        """Whether the file existed and its state is still to be restored."""
        return self._saved is not None

    def begin(self, loop: Loop) -> None:
        """Restore the saved state or, without a file, write the initial one.

        The initial file holds the random initial values too, and shows that the folder is writable before anything is
        computed.
        """
        if self._saved is None:
            self.write(loop)
            return
        saved, self._saved = self._saved, None
        # whole, before anything is restored
        try:
            saved.check(loop)
        except VisadaptError as error:
            raise VisadaptError(f"{self.path} is not a whole checkpoint of a training run: {error}") from error
        loop.run = saved.run
        loop.target.restore(saved.part("now"))
        loop.kept = saved.part("kept")
        state = loop.optimizer.state_dict()
        parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
        for key, value in saved.part("optimiser").items():
            index, slot = key.split(".")
            # in the parameter's memory format
            tensor = value if value.ndim == 0 else torch.empty_like(parameters[int(index)]).copy_(value)
            state["state"].setdefault(int(index), {})[slot] = tensor
        for group, rate in zip(state["param_groups"], saved.schedule["_last_lr"], strict=True):
            group["lr"] = rate
        loop.optimizer.load_state_dict(state)
        loop.schedule.load_state_dict({**loop.schedule.state_dict(), **saved.schedule})
        # cloned: torch crashes on a generator state that is a row of a larger tensor
        rank = loop.engine.rank
        loop.epoch_start, now = (
            {k: v[rank].clone() for k, v in saved.part(name).items()} for name in ("began", "here")
        )
        loop.random.restore(now)

    def write(self, loop: Loop) -> None:
        """Write the state of a training run; an existing file is replaced atomically."""
        loop.read()
        engine = loop.engine
        # each process has its own random state
        random = {
            name: {k: engine.gather(engine.place(v[None])) for k, v in state.items()}
            for name, state in (("began", loop.epoch_start), ("here", loop.random.state()))
        }
        if engine.rank != 0:
            return
        optimizer = {
            f"{index}.{slot}": value
            for index, slots in loop.optimizer.state_dict()["state"].items()
            for slot, value in slots.items()
            if isinstance(value, Tensor)
        }
        parts = {"now": loop.target.snapshot(), "kept": loop.kept, "optimiser": optimizer, **random}
        tensors = {
            f"{name}:{key}": t.detach().cpu().contiguous() for name, part in parts.items() for key, t in part.items()
        }
        notes = {
            "format": FORMAT,
            "identity": self.identity,
            "run": dataclasses.asdict(loop.run),
            "schedule": loop.schedule.state_dict(),
        }
        write_described(self.path, KIND, notes, tensors)
