"""Every promise of the core, asked of one method on one backbone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visadapt
from tests.models import bare_part, stir
from tests.runtime.agreement import TASKS, TOLERANCE, Weighted, calm, compare, differ, run
from tests.runtime.builds import Build
from visadapt import VisadaptError
from visadapt.backbone.batch import mapped
from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import backbone_tensors
from visadapt.methods.method import Method

CHECKS = ("start", "gradients", "eval", "train", "file", "merge", "frozen", "eject")

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

MERGED = (
    visadapt.Parallel, visadapt.Series, visadapt.LoRA, visadapt.SSF, visadapt.Full, visadapt.TopLayers, visadapt.Biases,
    visadapt.Linear, visadapt.Norms, visadapt.DAN, visadapt.DoRA,
)  # fmt: skip
"""Methods that are linear, or own weights: they can be merged."""

NEAR = {"TSA": 0.05}
"""Methods that promise to start near the backbone only, with how far off they may be."""


class Driven:
    """A backbone that methods are put on in turn, beside a task of another method that stays.

    Args:
        build: which.
        classes: width of its head.
        dtype: of its weights and inputs.
    """

    def __init__(self, build: Build, classes: int, dtype: torch.dtype = torch.float32) -> None:
        inputs = build.inputs
        self.build = replace(build, inputs=lambda n: mapped(lambda _, leaf: _cast(leaf, dtype), inputs(n)))
        self.classes = classes
        self.model = calm(self.build.make()).to(dtype).eval().requires_grad_(False)
        self.fresh = copy.deepcopy(self.model)
        self.given = self.build.batch(len(TASKS))
        facts = Facts(self.model)
        self.where, self.notes = "", list[str]()
        self.head, self.norms = facts.head is not None, bool(facts.norms)
        # in this order: the first forward may set buffers, such as indices for the size of its input
        self.before, self.state = self._answer(None), self._state()
        if not all(tensor.isfinite().all() for sample in self.before for tensor in sample):
            raise ValueError("the backbone's own output is not finite")
        self._put(visadapt.Bottleneck(m=2, activation="relu"), "c", {"num_classes": classes} if self.head else {})
        stir(self.model, "c", 3)

    def _state(self) -> dict[str, Tensor]:
        buffers = {key: tensor for key, tensor in self.model.named_buffers() if "visadapt" not in key.split(".")}
        parts = bare_part(self.model.state_dict()), buffers, backbone_tensors(self.model)
        return {f"{number} {key}": tensor.clone() for number, part in enumerate(parts) for key, tensor in part.items()}

    def _answer(self, task: str | None, model: nn.Module | None = None) -> list[list[Tensor]]:
        model = self.model if model is None else model
        with torch.no_grad():
            out = run(model, self.given, task) if visadapt.tasks(model) else model(*self.given[0])
        return self.build.samples(out, len(TASKS))

    def _off(self, found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
        return max(differ(one, other) for one, other in zip(found, expected, strict=True))

    def _put(self, method: Method, task: str, options: dict[str, Any]) -> None:
        own = not self.norms or isinstance(method, visadapt.Linear | visadapt.Biases | visadapt.Ladder)
        norms = "frozen" if own else "affine"
        visadapt.inject(self.model, method, task=task, norms=norms, example=self.given[0], **options)

    def start(self, method: Method) -> str:
        """Compare the output right after injection with the backbone's.

        The method is put at its default sites; where there is none, at all linears, or all convolutions.
        """
        options: dict[str, Any] = {"head": "copy"} if self.head else {}
        self.where, first = "", None
        for where in (None, "linear", "conv") if method.kinds else (None,):
            try:
                self._put(method, "a", {**options, "where": where})
            except VisadaptError as error:
                first = first or error
                continue
            self.where = where or ""
            self._put(method, "b", {**options, "where": where})
            break
        else:
            raise first or AssertionError
        off = self._off(self._answer("a"), self.before)
        for seed, task in enumerate("ab"):
            stir(self.model, task, seed)
        return f"the output is off by {off:.1e}" if off > NEAR.get(type(method).__name__, 0.0) else ""

    def gradients(self) -> str:
        """Look for trained parameters without a gradient."""
        self.model.train(self.build.trains)
        samples = self.build.samples(run(self.model, self.given, "a"), len(TASKS))
        Weighted()(samples, list(range(len(TASKS)))).backward()
        named = dict(visadapt.named_parameters(self.model, "a"))
        bad = _without_gradient(named)
        if bad:
            unused = self._unused()
            bad = [key for key in bad if not _less_one_name(key) & unused]
        return f"{len(bad)} of {len(named)} have none: {', '.join(bad[:3])}" if bad else ""

    def _unused(self) -> set[str]:
        """Names of the backbone's parameters that get no gradient in the plain backbone either."""
        plain = copy.deepcopy(self.fresh).train(self.build.trains).requires_grad_()
        samples = self.build.samples(plain(*self.given[0], **self.given[1]), len(TASKS))
        Weighted()(samples, list(range(len(TASKS)))).backward()
        return set(_without_gradient(dict(plain.named_parameters())))

    def mixed(self, training: bool) -> str:
        """Compare a mixed batch with each task alone."""
        off = compare(self.build, self.model, training)
        return f"a mixed batch is off by {off:.1e}" if off > TOLERANCE else ""

    def mixed_twice(self, method: Method, training: bool) -> str:
        """Compare again in float64 what differs in float32.

        Behind rounding, an activation with a kink may have the slope of its other side; that is rare in float64, where
        rounding is smaller by nine digits.
        """
        said = self.mixed(training)
        if not said or not training:
            return said
        exact = Driven(self.build, self.classes, torch.float64)
        exact.start(method)
        again = exact.mixed(training)
        if again:
            return f"{said} in float32; in float64, {again}"
        self.notes.append(f"train, right in float64: {said} in float32")
        return ""

    def file(self) -> str:
        """Save a task, and load it into another copy."""
        with tempfile.TemporaryDirectory() as folder:
            visadapt.load(self.fresh, visadapt.save(self.model, "a", Path(folder) / "a.visadapt"))
        try:
            off = self._off(self._answer("a", self.fresh), self._answer("a"))
        finally:
            visadapt.eject(self.fresh)
        return f"the output of the loaded task is off by {off:.1e}" if off else ""

    def merge(self) -> str:
        """Compare a merged copy with its task."""
        merged = visadapt.merge(self.model, "a", probe=self.given[0])
        off = self._off(self._answer(None, merged), self._answer("a"))
        return f"the merged model is off by {off:.1e}" if off > 1e-4 else ""

    def frozen(self) -> str:
        """Compare the backbone, when the tasks are removed, with what it was."""
        for task in set("ab") & set(visadapt.tasks(self.model)):
            visadapt.remove(self.model, task)
        return self._compared()

    def eject(self) -> str:
        """Compare what is left after eject with the backbone as it came."""
        visadapt.eject(self.model)
        return self._compared()

    def _compared(self) -> str:
        state = self._state()
        moved = set(self.state) ^ set(state)
        moved |= {key for key in set(self.state) & set(state) if not torch.equal(state[key], self.state[key])}
        off = self._off(self._answer(None), self.before)
        return f"off by {off:.1e}, other tensors: {sorted(moved)[:3]}" if off or moved else ""


def _without_gradient(named: dict[str, nn.Parameter]) -> list[str]:
    return [key for key, p in named.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


def _less_one_name(key: str) -> set[str]:
    """The names that are left when one part of a path is taken out, as that of a task's own weights."""
    names = key.split(".")
    return {".".join(names[:i] + names[i + 1 :]) for i in range(len(names))}


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def drive(driven: Driven, method: Method, last: bool = True) -> dict[str, str]:
    """Check every promise of one method on one backbone.

    Args:
        driven: the backbone.
        method: which.
        last: whether the backbone is ejected afterwards. It also is if anything is wrong.

    Returns:
        The result of each check, and details of those that are not right.
    """
    results, details = dict.fromkeys(CHECKS, ""), list[str]()
    driven.notes = details

    def judge(check: str, look: Callable[[], str]) -> bool:
        try:
            said = look()
            results[check] = "wrong" if said else "right"
        except VisadaptError as error:
            results[check], said = "refused", str(error)
        except Exception as error:  # the command counts them
            results[check], said = "crash", f"{type(error).__name__}: {error}"
        driven.model.eval()
        details.extend([f"{check}: {' '.join(said.split())[:250]}"] if said else [])
        return results[check] in ("right", "wrong")

    if judge("start", lambda: driven.start(method)):
        judge("gradients", driven.gradients)
        judge("eval", lambda: driven.mixed(False))
        if driven.build.trains:
            judge("train", lambda: driven.mixed_twice(method, True))
        judge("file", driven.file)
        if isinstance(method, MERGED):
            judge("merge", driven.merge)
    judge("frozen", driven.frozen)
    if last or {"wrong", "crash"} & set(results.values()):
        judge("eject", driven.eject)
    return {**results, "where": driven.where, "details": " | ".join(details)}
