"""Compare a merged model with its task, and the task with the bare backbone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visadapt.backbone.full_precision import full_precision
from visadapt.backbone.trace import call, check_input, guess_inputs, input_errors
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import facts_of, find_registry
from visadapt.runtime.selection import bare, using
from visadapt.runtime.twins import bare_twin, task_twin


@dataclass(frozen=True)
class Difference:
    """The difference between one tensor of a merged model and the task's, each by its largest element.

    Attributes:
        where: name of the tensor, for messages.
        error: the difference.
        change: the difference between the task and the bare backbone; None where the two cannot be compared.
        size: of the task's.
        dtype: of the tensor.
    """

    where: str
    error: float
    change: float | None
    size: float
    dtype: torch.dtype


@dataclass
class _Outcome:
    """The outputs of a model, and the inputs of its head."""

    outputs: list[Tensor]
    features: list[Tensor]


@torch.no_grad()
def differences(model: nn.Module, merged: nn.Module, task: str, probe: Any = None) -> list[Difference]:
    """Run a task, its merged model and the bare backbone on one input, and compare outputs and inputs of the head.

    A head of the task's own can hide a small change of the features, so these are compared as well.

    Args:
        model: the injected model.
        merged: the merged model.
        task: name of the task.
        probe: an input; random images or tokens if None.

    Raises:
        VisadaptError: the model does not run on a guessed input.
    """
    paths = [path for path in facts_of(model).head_modules if path]
    # on a copy with its own modes and hooks: other threads may be using the model, or have compiled it
    twin = task_twin(model, task) or model
    with full_precision():
        with bare(twin, task):
            expected, probe = _first_run(twin, paths, probe)
            with using(twin, None):
                plain = _run(twin, paths, probe)
        # a copy here as well: a short input may change a model for good (BigBird leaves its sparse attention)
        found = _run(_twin(merged), paths, probe)
    return [
        *_compared("what goes into the head", found.features, expected.features, plain.features),
        *_compared("the outputs", found.outputs, expected.outputs, plain.outputs),
    ]


def _twin(merged: nn.Module) -> nn.Module:
    if find_registry(merged) is not None:
        # its own tasks are a part of it
        return merged
    try:
        # with all hooks, as the task's copy has them: they may replace what they are shown
        return bare_twin(merged)
    except Exception:
        # a module that holds a lock, a file or a part of a graph may raise anything
        return merged


def _compared(where: str, found: list[Tensor], expected: list[Tensor], plain: list[Tensor]) -> list[Difference]:
    differing = []
    for index, (mine, task) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != task.shape:
            raise VisadaptError(
                f"merged must be a merge of the task: of {where} it has {tuple(mine.shape)}, and the task "
                f"{tuple(task.shape)}"
            )
        bare_one = plain[index] if index < len(plain) and plain[index].shape == task.shape else None
        change = None if bare_one is None else _largest(task, bare_one)
        differing.append(Difference(where, _largest(mine, task), change, _largest(task), task.dtype))
    return differing


def _largest(a: Tensor, b: Tensor | None = None) -> float:
    if a.numel() == 0:
        return 0.0
    if b is None:
        finite = a.abs()[a.isfinite()]
        return float(finite.max()) if finite.numel() else 0.0
    # values that are infinite in both are equal
    return float(torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max())


def _first_run(model: nn.Module, paths: list[str], probe: Any) -> tuple[_Outcome, Any]:
    if probe is not None:
        check_input(probe, "probe")
        with input_errors("probe"):
            return _run(model, paths, probe), probe
    failure: Exception | None = None
    for guess in _random_inputs(model):
        try:
            return _run(model, paths, guess), guess
        except Exception as error:  # noqa: PERF203 - whatever a model raises on an input that it cannot take
            failure = failure or error
    raise VisadaptError(
        f"{type(model).__name__} does not run on a guessed input ({failure}): pass probe= with one that it takes, "
        "or probe=False to merge without comparing"
    ) from failure


def _random_inputs(model: nn.Module) -> Iterator[Any]:
    """The guessed inputs with random values: equal tokens would not test attention."""
    generator = torch.Generator().manual_seed(0)
    words = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
    for guess in guess_inputs(model):
        if isinstance(guess, Tensor) and guess.is_floating_point():
            yield torch.randn(guess.shape, generator=generator).to(guess)
            continue
        ids = guess.get("input_ids") if isinstance(guess, dict) else guess
        if isinstance(ids, Tensor) and words > 1:
            drawn = torch.randint(words, ids.shape, generator=generator).to(ids)
            yield {**guess, "input_ids": drawn} if isinstance(guess, dict) else drawn
        yield guess


def _run(model: nn.Module, paths: list[str], probe: Any) -> _Outcome:
    with _watched(model, paths) as features:
        outputs = tensors_in(call(model, probe))
    return _Outcome(outputs, features)


@contextmanager
def _watched(model: nn.Module, paths: list[str]) -> Iterator[list[Tensor]]:
    """Collect the inputs of modules in this thread."""
    features: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            features.extend(t.detach().clone() for t in tensors_in(args))

    try:
        watched = [model.get_submodule(path) for path in paths]
    except AttributeError as error:
        raise VisadaptError(f"merged must be a merge of this model: {error}") from error
    handles = [module.register_forward_pre_hook(keep) for module in watched]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(out: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    leaves = tree_leaves(dict(out) if hasattr(out, "keys") else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
