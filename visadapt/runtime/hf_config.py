"""transformers compute losses by ``config.num_labels`` and ``config.problem_type``: here each task has its own."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from visadapt.backbone.subclass import cached, subclass
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import Mixed, Named, Registry, Task, registry_of


def is_labelled(model: nn.Module) -> bool:
    """Whether a model computes losses by a config, as transformers' ``…ForSequenceClassification`` does."""
    return hasattr(model.__dict__.get("config"), "num_labels")


def label(model: nn.Module) -> None:
    """Let a transformers model see the active task's ``config`` and ``num_labels``."""
    model.__class__ = labelled_class(type(model))


def task_config(model: nn.Module, task: Task) -> Any:
    """A task's own copy of a model's config, with its number of labels and their names."""
    config = copy.deepcopy(model.__dict__["config"])
    if task.num_classes is not None and task.num_classes != config.num_labels:
        config.num_labels = task.num_classes
        # the kind of loss follows from the first labels
        config.problem_type = None
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    return config


def _config(self: nn.Module) -> Any:
    registry: Registry | None = self.__dict__.get("_visadapt")
    task = None if registry is None else registry.current()
    own = self.__dict__["config"]
    if registry is None or task is None:
        return own
    if not isinstance(task, tuple):
        return registry.configs.get(task, own)
    if torch.compiler.is_dynamo_compiling() and isinstance(task, Named) and task.config is not None:
        # looked up before, so that a graph does not depend on the tasks' names
        return task.config
    if not isinstance(task, Mixed):
        return mixed_config(registry, task, own)
    # within a forward, which asks several times
    if task.config is None:
        task.config = mixed_config(registry, task, own)
    return task.config


def mixed_config(registry: Registry, tasks: tuple[str | None, ...], own: Any) -> Any:
    """The config of a batch whose logits are as wide as the widest of its tasks' heads."""
    distinct = tuple(dict.fromkeys(tasks))
    configs = [own if task is None else registry.configs.get(task, own) for task in distinct]
    # each read once: transformers answers an attribute of a config by several calls
    told = [(config.num_labels, config.problem_type) for config in configs]
    widths = {width for width, _ in told}
    problem = _problem({_kind(*each) for each in told}, widths)
    # a kind of loss inferred from the first labels does not hold for other tasks
    key = (max(widths), problem, distinct if problem is None else ())
    if key not in registry.configs:
        if problem is None:
            _forget_open(registry)
        # not a deep copy, which takes as long as a small network's forward: the values below are replaced, not changed
        config = copy.copy(own)
        config.num_labels = key[0]
        if problem == UNDECIDED:
            plain: Any = type(config)
            config.__class__ = _undecided(plain)
        else:
            config.problem_type = problem
        registry.configs[key] = config
    return registry.configs[key]


UNDECIDED = "undecided"
"""Instead of a kind of loss: the tasks of a batch have several."""


def _kind(width: int, problem: str | None) -> str | None:
    """The kind of loss of a config; None if that follows from the first labels."""
    return "regression" if problem is None and width == 1 else problem


def _problem(kinds: set[str | None], widths: set[int]) -> str | None:
    """The kind of loss of a batch, ``UNDECIDED`` if no single one is right for all of its tasks."""
    single = "single_label_classification"
    if kinds == {None} and len(widths) == 1:
        return None
    if kinds <= {None, single}:
        # heads of different widths are padded with −inf, which only a softmax ignores
        return single
    return next(iter(kinds)) if len(kinds) == len(widths) == 1 else UNDECIDED


def _forget_open(registry: Registry) -> None:
    """Keep the configs of no more than some combinations of tasks."""
    kept = [key for key in registry.configs if isinstance(key, tuple) and key[2]]
    for key in kept[: max(len(kept) - 255, 0)]:
        del registry.configs[key]


@cache
def _undecided(plain: Any) -> type:
    """A subclass of a config that refuses to name a loss."""

    def refuse(self: Any) -> Any:
        raise VisadaptError(
            "a batch of tasks with different kinds of loss (regression, single-label, multi-label), or of several "
            "widths under another loss than cross-entropy, has no common loss: leave the labels out and compute each "
            "task's from its logits (visadapt.split)"
        )

    return type(plain.__name__, (plain,), {"problem_type": property(refuse), "__module__": plain.__module__})


def _set_config(self: nn.Module, config: Any) -> None:
    self.__dict__["config"] = config


def _num_labels(self: nn.Module) -> int:
    return int(_config(self).num_labels)


def _set_num_labels(self: nn.Module, number: int) -> None:
    self.__dict__["num_labels"] = number


@cached
def labelled_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose ``config`` and ``num_labels`` are those of the active task."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the head saved under its own name is the backbone's, so the config beside it must be too
        with registry_of(self).only(None):
            return plain.save_pretrained(self, *args, **kwargs)  # type: ignore[attr-defined]

    return subclass(
        plain,
        labelled_class,
        config=property(_config, _set_config),
        num_labels=property(_num_labels, _set_num_labels),
        save_pretrained=save_pretrained,
    )
