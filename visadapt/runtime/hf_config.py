"""transformers compute losses by ``config.num_labels`` and ``config.problem_type``: here each task has its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from visadapt.backbone.subclass import cached, subclass
from visadapt.runtime.registry import Registry, Task
from visadapt.runtime.selection import using


def is_labelled(model: nn.Module) -> bool:
    """Whether a model computes losses by a config, as transformers' ``…ForSequenceClassification`` does."""
    return hasattr(model.__dict__.get("config"), "num_labels")


def label(model: nn.Module) -> None:
    """Lets a transformers model see the active task's ``config`` and ``num_labels``."""
    model.__class__ = labelled_class(type(model))


def task_config(model: nn.Module, task: Task) -> Any:
    """A task's own copy of a model's config, with its number of labels and their names."""
    config = copy.deepcopy(model.__dict__["config"])
    if task.num_classes is not None and task.num_classes != config.num_labels:
        config.num_labels = task.num_classes
        # what the loss is, is told by the first labels that come
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
    return _mixed_config(registry, task, own) if isinstance(task, tuple) else registry.configs.get(task, own)


def _mixed_config(registry: Registry, tasks: tuple[str | None, ...], own: Any) -> Any:
    """The config of a batch whose logits are as wide as the widest of its tasks' heads."""
    configs = [own if task is None else registry.configs.get(task, own) for task in dict.fromkeys(tasks)]
    widths, types = {config.num_labels for config in configs}, {config.problem_type for config in configs}
    # heads of different widths are padded with −inf, which only a softmax forgives
    problem = types.pop() if len(widths) == len(types) == 1 else "single_label_classification"
    key = (max(widths), problem)
    if key not in registry.configs:
        config = copy.deepcopy(own)
        config.num_labels, config.problem_type = key
        registry.configs[key] = config
    return registry.configs[key]


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
        # the head that is saved under its own name is the backbone's, and so must be the config beside it
        with using(self, None):
            return plain.save_pretrained(self, *args, **kwargs)  # type: ignore[attr-defined]

    return subclass(
        plain,
        labelled_class,
        config=property(_config, _set_config),
        num_labels=property(_num_labels, _set_num_labels),
        save_pretrained=save_pretrained,
    )
