"""Every promise of the core, asked of one method on one backbone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visadapt
from tests.models import bare_part, stir
from tests.runtime.agreement import TASKS, TOLERANCE, Weighted, calm, compare, differ, run
from tests.runtime.builds import Build
from visadapt import VisadaptError
from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import backbone_tensors
from visadapt.methods.method import Method

CHECKS = ("start", "gradients", "eval", "train", "file", "merge", "eject")

COMMON: dict[str, Method] = {
    "Bottleneck": visadapt.Bottleneck(m=3),
    "Parallel": visadapt.Parallel(),
    "Series": visadapt.Series(norm=False),
    "LoRA": visadapt.LoRA(r=2),
    "SSF": visadapt.SSF(),
    "ConvAdapter": visadapt.ConvAdapter(),
    "Full": visadapt.Full(),
    "TopLayers": visadapt.TopLayers(1),
}
"""Methods that every architecture meets."""

MORE: dict[str, Method] = {
    "Biases": visadapt.Biases(),
    "Linear": visadapt.Linear(),
    "Norms": visadapt.Norms(),
    "DAN": visadapt.DAN(),
    "DoRA": visadapt.DoRA(r=2),
    "CoLoRA": visadapt.CoLoRA(r=2),
    "Ladder": visadapt.Ladder(m=3),
    "Mona": visadapt.Mona(m=3, dropout=0.0),
    "AdaptFormer": visadapt.AdaptFormer(m=3),
    "TSA": visadapt.TSA(),
}

MERGED = ("Parallel", "Series", "LoRA", "SSF", "Full", "TopLayers", "Biases", "Linear", "Norms", "DAN", "DoRA")
"""Methods that are linear, or own weights: they can be merged."""

NEAR = {"TSA": 0.05}
"""Methods that promise to start near the backbone only, with how far off they may be."""


class Driven:
    """A backbone that methods are put on in turn.

    Args:
        build: which.
    """

    def __init__(self, build: Build) -> None:
        self.build = build
        self.model = calm(self.build.make()).eval().requires_grad_(False)
        self.fresh = copy.deepcopy(self.model)
        self.given = self.build.batch(len(TASKS))
        facts = Facts(self.model)
        self.head = {"num_classes": 4} if facts.head is not None else {}
        self.norms = bool(facts.norms)
        self.state, self.before = self._state(), self._answer(None)
        if not all(tensor.isfinite().all() for sample in self.before for tensor in sample):
            raise ValueError("the backbone's own output is not finite")

    def _state(self) -> dict[str, Tensor]:
        buffers = {key: tensor for key, tensor in self.model.named_buffers() if "visadapt" not in key.split(".")}
        parts = bare_part(self.model.state_dict()), buffers, backbone_tensors(self.model)
        return {f"{number} {key}": tensor.clone() for number, part in enumerate(parts) for key, tensor in part.items()}

    def _answer(self, task: str | None, model: nn.Module | None = None) -> list[list[Tensor]]:
        model = self.model if model is None else model
        with torch.no_grad():
            out = run(model, self.given, task) if visadapt.tasks(model) else model(*self.given[0])
        return self.build.samples(out, len(TASKS))

    def put(self, method: Method, name: str, task: str, seed: int | None) -> None:
        """Inject a task; with a seed, give it a head and move what it trains."""
        norms = "affine" if self.norms and name not in ("Linear", "Biases", "Ladder") else "frozen"
        options: dict[str, Any] = self.head
        if self.head and seed is None:
            options = {"head": "copy" if name == "Linear" else "frozen"}
        visadapt.inject(self.model, method, task=task, norms=norms, example=self.given[0], **options)
        if seed is not None:
            stir(self.model, task, seed)

    def start(self, method: Method, name: str) -> str:
        """Compare the output right after injection with the backbone's."""
        try:
            self.put(method, name, "probe", None)
            apart = max(map(differ, self._answer("probe"), self.before))
        finally:
            if "probe" in visadapt.tasks(self.model):
                visadapt.remove(self.model, "probe")
        return "" if apart <= NEAR.get(name, 0.0) else f"the output is off by {apart:.1e}"

    def gradients(self) -> str:
        """Look for trained parameters without a gradient."""
        visadapt.activate(self.model, "a")
        self.model.train(self.build.trains)
        samples = self.build.samples(run(self.model, self.given, "a"), len(TASKS))
        Weighted()(samples, list(range(len(TASKS)))).backward()
        named = dict(visadapt.named_parameters(self.model, "a"))
        bad = [key for key, p in named.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
        for p in named.values():
            p.grad = None
        self.model.eval()
        return f"{len(bad)} of {len(named)} have none: {', '.join(bad[:3])}" if bad else ""

    def mixed(self, training: bool) -> str:
        """Compare a mixed batch with each task alone."""
        apart = compare(self.build, self.model, training)
        self.model.eval()
        return "" if apart <= TOLERANCE else f"a mixed batch is off by {apart:.1e}"

    def file(self) -> str:
        """Save a task, and load it into another copy."""
        with tempfile.TemporaryDirectory() as folder:
            visadapt.load(self.fresh, visadapt.save(self.model, "a", Path(folder) / "a.visadapt"))
        try:
            apart = max(map(differ, self._answer("a", self.fresh), self._answer("a")))
        finally:
            visadapt.eject(self.fresh)
        return f"the output of the loaded task is off by {apart:.1e}" if apart else ""

    def merge(self) -> str:
        """Compare a merged copy with its task."""
        merged = visadapt.merge(self.model, "a", probe=self.given[0])
        apart = max(map(differ, self._answer(None, merged), self._answer("a")))
        return f"the merged model is off by {apart:.1e}" if apart > 1e-4 else ""

    def eject(self) -> str:
        """Compare what is left after eject with the backbone as it came."""
        visadapt.eject(self.model.eval())
        state = self._state()
        moved = [key for key in self.state | state if not torch.equal(state.get(key, key), self.state.get(key, key))]
        apart = max(map(differ, self._answer(None), self.before))
        return f"off by {apart:.1e}, other tensors: {moved[:3]}" if apart or moved else ""


def drive(driven: Driven, name: str, method: Method) -> dict[str, str]:
    """Check every promise of one method on one backbone."""
    results, details = dict.fromkeys(CHECKS, ""), []

    def judge(check: str, look: Callable[[], str]) -> bool:
        try:
            said = look()
            results[check] = "wrong" if said else "right"
        except VisadaptError as error:
            results[check], said = "refused", str(error)
        except Exception as error:  # the command counts them
            results[check], said = "crash", f"{type(error).__name__}: {error}"
        details.extend([f"{check}: {' '.join(said.split())[:250]}"] if said else [])
        return results[check] in ("right", "wrong")

    def put() -> str:
        driven.put(method, name, "a", 1)
        driven.put(method, name, "b", 2)
        driven.put(visadapt.Bottleneck(m=2, activation="relu"), "Bottleneck", "c", 3)
        return driven.gradients()

    if judge("start", lambda: driven.start(method, name)) and judge("gradients", put):
        judge("eval", lambda: driven.mixed(False))
        if driven.build.trains:
            judge("train", lambda: driven.mixed(True))
        judge("file", driven.file)
        if name in MERGED:
            judge("merge", driven.merge)
    if visadapt.tasks(driven.model):
        judge("eject", driven.eject)
    return {**results, "details": " | ".join(details)}
