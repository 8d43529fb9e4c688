"""The task decider: a small classifier on the frozen backbone's features that picks the task of an unlabelled input.

Rosenfeld & Tsotsos 2018 (arXiv 1705.04228) train a network to recognise the data set of an image; here it is one linear
layer on the features that the bare backbone gives its head, since the backbone is in memory anyway.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.arguments import takes
from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import differences, fingerprint
from visadapt.backbone.modules import unwrapped
from visadapt.backbone.trace import call, input_errors
from visadapt.checks import check_count, check_non_negative
from visadapt.errors import VisadaptError
from visadapt.reading import check_file
from visadapt.runtime.forked import check_backward
from visadapt.runtime.registry import facts_of, find_registry, registry_of
from visadapt.runtime.twins import bare_twin
from visadapt.tensor_file import read_described, write_described
from visadapt.typed import fits

KIND = "visadapt_decider"
"""Key of the description in a decider's file."""


_HEARD: ContextVar[list[Tensor] | None] = ContextVar("visadapt_heard", default=None)
"""The input of the head, in the forward of this thread."""


class Decider(nn.Module):
    """p(task | x) = softmax(W·(f(x) − μ)/σ + b) on the bare backbone's features f(x).

    Args:
        tasks: names of the tasks, in the order of the logits.
        mean: ``(D,)``, μ of the features it was fitted on.
        std: ``(D,)``, σ of them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tasks: tuple[str, ...], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        # it starts at zero: the caller's random state does not change
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, len(mean), len(tasks), device=mean.device)  # type: ignore
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(N, D)`` features → ``(N, T)`` logits over the tasks."""
        logits: Tensor = self.linear((features.to(self.mean) - self.mean) / self.std)
        return logits

    @torch.no_grad()
    def choose(self, model: nn.Module, inputs: Any) -> list[str]:
        """The task of each sample of a batch.

        Raises:
            VisadaptError: a task that the decider knows is no longer in the model.
        """
        found = features(model, inputs)
        if found.ndim != 2 or found.shape[1] != len(self.mean):
            raise VisadaptError(
                f"the decider takes features (N, {len(self.mean)}), and these inputs have {tuple(found.shape)}"
            )
        names = [self.tasks[i] for i in _on(self, found.device)(found).argmax(1).tolist()]
        for name in set(names):
            registry_of(model).task(name)
        return names


def _on(decider: Decider, device: torch.device) -> Decider:
    # a copy: another thread may be deciding
    return decider if decider.mean.device == device else copy.deepcopy(decider).to(device)


@torch.no_grad()
def features(model: nn.Module, inputs: Any) -> Tensor:
    """The features that the bare backbone gives its head, ``(N, D)``: the mean over positions of a map or sequence.

    Args:
        model: an injected model whose head visadapt finds.
        inputs: a batch as the model takes it: a tensor, a tuple or a dict.

    Raises:
        VisadaptError: the model has no head that is found.
    """
    backbone = unwrapped(model)
    head = facts_of(model).head
    if head is None:
        raise VisadaptError(f"{type(backbone).__name__} has no head that visadapt finds, so no features to decide on")
    heard: list[Tensor] = []
    token = _HEARD.set(heard)
    try:
        with input_errors("inputs"):
            call(_listener(model, facts_of(model)), inputs)
    finally:
        _HEARD.reset(token)
    found = heard[0]
    return (found.flatten(2).mean(2) if found.ndim == 4 else found.mean(1) if found.ndim == 3 else found).float()


def _listener(model: nn.Module, facts: Facts) -> nn.Module:
    """A copy of the bare backbone, made once: without the tasks, modes and hooks of the model."""
    registry = find_registry(model)
    if registry is not None and registry.listener is not None and registry.listener[0] is facts:
        return registry.listener[1]  # type: ignore[no-any-return]
    twin = bare_twin(model)
    # the first of the head's modules: its input is the features
    twin.get_submodule(facts.head_modules[0]).register_forward_pre_hook(_hear)
    if registry is not None:
        registry.listener = (facts, twin)
    return twin


def _hear(module: nn.Module, args: Any) -> None:
    heard = _HEARD.get()
    if heard is not None:
        heard.append(args[0])


@takes()
def fit_decider(
    model: nn.Module, samples: Mapping[str, Iterable[Any]], *, weight_decay: float = 1e-3, steps: int = 100
) -> Decider:
    """Fit a decider on inputs of each task, without labels, and attach it to the model for ``using(model, "auto")``.

    Args:
        model: an injected model.
        samples: task → its batches of inputs, each as the model takes it. A few hundred inputs per task are plenty.
        weight_decay: of the linear layer.
        steps: of L-BFGS at most.

    Returns:
        The decider. Its accuracy on held-out inputs is what `decide` gives.

    Raises:
        VisadaptError: fewer than two tasks, one that does not exist, or one without samples.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="dark", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="bright", num_classes=3).eval()
        >>> dark, bright = torch.randn(8, 3, 32, 32) - 2, torch.randn(8, 3, 32, 32) + 2
        >>> decider = visadapt.fit_decider(model, {"dark": [dark], "bright": [bright]})
        >>> decider.tasks
        ('dark', 'bright')
    """
    check_backward("fit_decider")
    check_non_negative(weight_decay, "weight_decay")
    if weight_decay > torch.finfo(torch.float32).max:
        raise VisadaptError(f"weight_decay must be a number that float32 can hold, got {weight_decay!r}")
    check_count(steps, "steps")
    registry = registry_of(model)
    names = tuple(registry.task(name).name for name in samples)
    if len(names) < 2:
        raise VisadaptError(f"a decider must have samples of two or more tasks, got {len(names)}")
    found = {name: [features(model, batch) for batch in samples[name]] for name in names}
    empty = [name for name in names if not found[name]]
    if empty:
        raise VisadaptError(f"no samples of task {empty[0]!r} to fit the decider on")
    sets = [torch.cat(found[name]) for name in names]
    x, y = torch.cat(sets), torch.cat([torch.full((len(s),), i, device=s.device) for i, s in enumerate(sets)])
    decider = Decider(names, x.mean(0), x.std(0).clamp_min(1e-6))
    optimiser = torch.optim.LBFGS(decider.parameters(), max_iter=steps, line_search_fn="strong_wolfe")
    # every task has the same weight, whatever its number of samples
    weight = torch.stack([(len(x) / len(names)) / (y == i).sum() for i in range(len(names))])

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(decider(x), y, weight) + weight_decay * decider.linear.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    registry.decider = decider.requires_grad_(False).eval()
    return decider


def decide(model: nn.Module, inputs: Any) -> list[str]:
    """Choose the task of each sample by the model's decider.

    Args:
        model: an injected model with a decider.
        inputs: a batch as the model takes it.

    Returns:
        The name of the task of each sample, in the order of the batch.

    Raises:
        VisadaptError: the model has no decider, or its decider names a task that is gone.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="dark", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="bright", num_classes=3).eval()
        >>> dark, bright = torch.randn(8, 3, 32, 32) - 2, torch.randn(8, 3, 32, 32) + 2
        >>> decider = visadapt.fit_decider(model, {"dark": [dark], "bright": [bright]})
        >>> visadapt.decide(model, torch.cat([dark[:1], bright[:1]]))
        ['dark', 'bright']
    """
    registry = registry_of(model)
    if registry.decider is None:
        raise VisadaptError("this model has no decider: visadapt.fit_decider makes one, load_decider reads one")
    decider: Decider = registry.decider
    return decider.choose(model, inputs)


@takes()
def save_decider(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the model's decider to a safetensors file, atomically.

    Args:
        model: an injected model with a decider.
        path: file to write.

    Returns:
        The path.

    Raises:
        VisadaptError: the model has none, or the folder cannot be written to.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="dark", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="bright", num_classes=3).eval()
        >>> dark, bright = torch.randn(8, 3, 32, 32) - 2, torch.randn(8, 3, 32, 32) + 2
        >>> decider = visadapt.fit_decider(model, {"dark": [dark], "bright": [bright]})
        >>> visadapt.save_decider(model, "decider.safetensors").name
        'decider.safetensors'
    """
    decider = registry_of(model).decider
    if decider is None:
        raise VisadaptError("this model has no decider to save: visadapt.fit_decider makes one")
    description = {"tasks": decider.tasks, "backbone": _backbone(model)}
    write_described(Path(path), KIND, description, decider.state_dict())
    return Path(path)


@takes()
def load_decider(model: nn.Module, path: str | os.PathLike[str]) -> Decider:
    """Load a decider into an injected model.

    Args:
        model: an injected model.
        path: file that `save_decider` wrote.

    Returns:
        The decider; the model uses it from now on.

    Raises:
        VisadaptError: no such file, or no whole decider in it; it was fitted on another backbone (what differs is
            named); a task it knows is not in the model.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="dark", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="bright", num_classes=3).eval()
        >>> dark, bright = torch.randn(8, 3, 32, 32) - 2, torch.randn(8, 3, 32, 32) + 2
        >>> decider = visadapt.fit_decider(model, {"dark": [dark], "bright": [bright]})
        >>> path = visadapt.save_decider(model, "decider.safetensors")
        >>> visadapt.load_decider(model, path).tasks
        ('dark', 'bright')
    """
    registry = registry_of(model)
    decider = read_decider(model, path)
    for name in decider.tasks:
        registry.task(name)
    registry.decider = decider
    return decider


def read_decider(model: nn.Module, path: str | os.PathLike[str]) -> Decider:
    """Read a decider of a model's backbone, whose tasks need not be in the model yet.

    Args:
        model: the backbone, injected or not.
        path: of the file.

    Raises:
        VisadaptError: no such file, or no whole decider in it; it was fitted on another backbone.
    """
    check_file(path, "path", "a decider's file")
    if not os.path.isfile(path):
        raise VisadaptError(f"no file {path}")
    try:
        content = read_described(Path(path), KIND, "decider")
        description, tensors = content.description, content.tensors
        tasks, backbone = description["tasks"], description["backbone"]
        if (
            not fits(tasks, list[str])
            or not fits(backbone, dict[str, list[str]])
            or any(len(pair) != 2 for pair in backbone.values())
        ):
            raise TypeError("tasks must be names, and the backbone digests of tensors")
    except (TypeError, KeyError) as error:
        raise VisadaptError(f"{path} is not a whole decider: {error}") from error
    unlike = differences(backbone, _backbone(model, content.digest is not None), values=True)
    if unlike:
        raise VisadaptError(
            f"{path} was fitted on another backbone than this {type(unwrapped(model)).__name__}: {unlike}"
        )
    try:
        names = tuple(tasks)
        _check(names, tensors, _width(model))
        decider = Decider(names, tensors["mean"], tensors["std"])
        decider.load_state_dict(tensors)
    except VisadaptError as error:
        raise VisadaptError(f"{path} is not a whole decider: {error}") from error
    return decider.requires_grad_(False).eval()


def _check(tasks: tuple[str, ...], tensors: Mapping[str, Tensor], width: int | None) -> None:
    """Refuse tensors that do not make a decider for these tasks, on features of this width (None: unknown)."""
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        raise VisadaptError(f"it must choose between two tasks or more, got {', '.join(tasks)}")
    wide = tensors["mean"].numel() if "mean" in tensors else 0
    shapes = {"mean": (wide,), "std": (wide,), "linear.weight": (len(tasks), wide), "linear.bias": (len(tasks),)}
    for name in (*shapes, *tensors):
        if name not in tensors or name not in shapes:
            raise VisadaptError(f"it {'lacks' if name in shapes else 'has an unknown'} {name}")
        tensor = tensors[name]
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != tensors["mean"].dtype:
            raise VisadaptError(f"{name} is {tensor.dtype}, expected torch.float32")
        if tensor.shape != shapes[name]:
            raise VisadaptError(f"{name} is {tuple(tensor.shape)}, expected {shapes[name]}")
        if not tensor.isfinite().all():
            raise VisadaptError(f"{name} has a value that is not finite")
    if wide != (wide if width is None else width) or wide == 0:
        raise VisadaptError(f"it takes features of width {wide}, and this model's are of width {width}")
    if tensors["std"].min() <= 0:
        raise VisadaptError("std must be positive")


def _width(model: nn.Module) -> int | None:
    """Width of the features that `features` gives; None if the head's first layer does not say."""
    backbone, head = unwrapped(model), facts_of(model).head
    if head is None:
        raise VisadaptError(f"{type(backbone).__name__} has no head that visadapt finds, so no features to decide on")
    first = backbone.get_submodule(head.modules[0])
    found = first.in_features if isinstance(first, nn.Linear) else getattr(first, "in_channels", None)
    return found if isinstance(found, int) else None


def _backbone(model: nn.Module, packed: bool = True) -> dict[str, list[str]]:
    """The fingerprint of what gives the features: the backbone without its head."""
    registry = find_registry(model)
    known = {} if registry is None else registry.digests
    return fingerprint(unwrapped(model), facts_of(model).head_modules, known, packed)
