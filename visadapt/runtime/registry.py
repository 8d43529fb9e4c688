"""The registry of a model: its tasks, and the facts that all its hosts share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import Digests, is_on_meta
from visadapt.backbone.heads import Head
from visadapt.backbone.modules import CHILD, own_modules, relative, unwrapped
from visadapt.backbone.rows import RowFacts
from visadapt.backbone.shared_pass import SharedPass
from visadapt.backbone.structure import STRUCTURE
from visadapt.errors import VisadaptError, nearest
from visadapt.methods.method import Method
from visadapt.printable import shown
from visadapt.runtime.blocks import Block
from visadapt.runtime.choice import AUTO, Choices
from visadapt.runtime.noting import Noted
from visadapt.runtime.symbolic import called, run_in_turn
from visadapt.runtime.task_modules import TaskModules
from visadapt.runtime.unfilled import Unfilled
from visadapt.runtime.versions import Versions
from visadapt.runtime.watch import Watch


class Named(tuple[str | None, ...]):
    """The tasks of the next batches, one per sample, as `visadapt.using` was given them. A copy is a plain tuple.

    Attributes:
        composition: of these tasks; see `visadapt.runtime.composition`.
        numbers: the number of each sample's task, −1 for the bare backbone; the input of a compiled graph.
        logits: an empty tensor as long as the logits are wide, which a graph takes as a dynamic size.
        config: of the batch, of a model of transformers; see `visadapt.runtime.hf_config`.
    """

    composition: Any
    numbers: Tensor | None = None
    logits: Tensor | None = None
    config: Any = None

    @classmethod
    def of(cls, composition: Any) -> Named:
        """The tasks of a composition."""
        named = cls(composition.tasks)
        named.composition = composition
        return named

    def __reduce__(self) -> Any:
        return tuple, (list(self),)


class Mixed(Named):
    """The tasks of a batch within a forward of the whole model, with the row facts of this batch.

    Attributes:
        rows: the facts of the batch.
        shared: where one sample becomes one row per task; None where every task has a sample of its own.
    """

    rows: RowFacts
    shared: SharedPass | None = None

    @staticmethod
    def within(composition: Any, rows: RowFacts, shared: SharedPass | None = None) -> Mixed:
        """The tasks of a composition with the facts of their batch."""
        mixed = Mixed(composition.tasks)
        mixed.composition, mixed.rows, mixed.shared = composition, rows, shared
        return mixed


@dataclass(frozen=True)
class Placement:
    """One method at its sites (full names, ``kind:host``), as ``inject`` put it there."""

    method: Method
    sites: tuple[str, ...]


@dataclass
class Task:
    """Everything that a downstream problem trains, by description; the tensors live in the hosts.

    Attributes:
        name: letters, digits, ``_`` and ``-``.
        norms: ``frozen``, ``affine`` or ``full``.
        head: ``new`` (of ``num_classes`` outputs), ``copy`` (of the backbone's) or ``frozen`` (the backbone's own).
        num_classes: width of the task's head; None with a frozen head.
        labels: the classes' names, in the order of the head's outputs, where they are known.
        placements: methods and their sites.
        hosts: paths of the modules that hold a part of this task.
        notes: further entries of its file, as JSON values.
        head_at: where its own head is; None with a frozen head.
        also: paths of the modules of which it trains a copy beside its head.
        drawn: the bits of a new head's initial values; None for another, or one that was loaded.
        inputs: prepares its raw inputs, once that is established; not written to its file, which has a description.
        origin: where it was loaded from, such as a file or a repository at a revision; None if it was made here.
        held: its parts and profile, once a mixed batch needed them; a copy finds its own.
        number: unique in the model, also among removed tasks; later tasks have larger ones.
        digest: of the file that it was loaded from; None if it was made here, or if the file has none.
    """

    name: str
    norms: str
    head: str
    num_classes: int | None = None
    labels: tuple[str, ...] | None = None
    placements: list[Placement] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    head_at: Head | None = None
    also: tuple[str, ...] = ()
    drawn: int | None = field(default=None, repr=False, compare=False)
    inputs: Any = field(default=None, compare=False, repr=False)
    origin: str | None = field(default=None, compare=False)
    held: Any = field(default=None, compare=False, repr=False)
    number: int = field(default=0, compare=False, repr=False)
    digest: str | None = field(default=None, compare=False)

    @property
    def owned(self) -> tuple[str, ...]:
        """Paths of the modules that the task replaces by its own."""
        return (*(self.head_at.modules if self.head_at else ()), *self.also)


@dataclass(frozen=True)
class Source:
    """The name and options that a backbone was loaded with.

    Attributes:
        name: such as ``"timm/resnet50"``.
        build: options for its loader.
        by_hand: whether the caller chose it, and not a file.
    """

    name: str
    build: dict[str, Any]
    by_hand: bool = True


class Registry(Choices):
    """The tasks of one injected model, shared by all its hosts (and copied with it by ``deepcopy``).

    Attributes:
        tasks: by name.
        hosts: every module that holds parts, by its path in the model. Like ``tasks`` it is replaced, never changed.
        facts: of the backbone, as last established.
        trained: names of the backbone's parameters that required a gradient before the first inject.
        versions: which of the backbone's parameters changed since the registry was made, at the first inject.
        configs: a task's own copy of a transformers model's config, by task; of mixed batches by width and problem.
        digests: of the backbone's tensors, as far as they are known.
        lean: what `visadapt.lean` made of the model, None if it was not called.
        decider: the one that ``auto`` asks.
        watch: checks the backbone's tensors before and after each forward.
        noted: the hooks that run in mixed batches.
        unfilled: the tasks that may have tensors without values.
        example: an input that ``inject`` was given, by its shapes, for a run on fake tensors.
        traced: sites that no family knows, by full name, as they were traced.
        source: how the backbone was loaded; None if it was given as a module.
        profiles: of tasks, as far as mixed batches needed them.
        doors: ``hosts`` as they were when the modules around them were made to take batches of mixed tasks.
        last_number: the number of the newest task, removed or not.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.tasks: dict[str, Task] = {}
        self.hosts: dict[str, nn.Module] = {}
        self.trained: frozenset[str] = frozenset()
        self.versions = Versions(facts.model)
        self.watch = Watch()
        self.unfilled = Unfilled()
        self.noted = Noted()
        self.traced: dict[str, Any] = {}
        self.configs: dict[Any, Any] = {}
        self.decider: Any = None
        self.digests: Digests = {}
        self.lean: Any = None
        self.source: Source | None = None
        self.example: Any = None
        self.profiles: list[Any] = []
        self.doors: dict[str, nn.Module] | None = None
        self.last_number = 0
        self._by_number: tuple[Any, dict[int, str]] = (None, {})
        # by task, the number of changes that its modules have
        self._followed: dict[str, int] = {}

    def task(self, name: Any) -> Task:
        """The task of that name.

        Raises:
            VisadaptError: there is none; the nearest is named.
        """
        if isinstance(name, str):
            # a subclass may compare as it likes
            name = str.__str__(name)
        if not isinstance(name, str) or name not in self.tasks:
            hint = nearest(name, self.tasks) or "; the model has no tasks yet: visadapt.inject makes one"
            raise VisadaptError(f"no task {shown(name)}{hint}")
        return self.tasks[name]

    def by_number(self) -> dict[int, str]:
        """The names of the tasks by their numbers."""
        tasks, names = self._by_number
        if tasks is not self.tasks:
            tasks = self.tasks
            names = {task.number: name for name, task in tasks.items()}
            self._by_number = tasks, names
        return names

    def parts(self, name: str) -> dict[str, nn.ModuleDict]:
        """A task's parts by host path, in the order they were put in."""
        with STRUCTURE:
            return {path: cast("Parts", self.hosts[path]._modules[CHILD])[name] for path in self.task(name).hosts}

    def follow(self, block: Block) -> None:
        for name, task in block.taken:
            changes = self.changes
            if task is not None and self._followed.get(name) != changes:
                for path in task.hosts:
                    host = self.hosts.get(path)
                    parts = None if host is None else host._modules.get(CHILD)
                    if isinstance(parts, Parts):
                        parts._of(name)
                self._followed[name] = changes

    def has_gradients(self, name: str) -> bool:
        with STRUCTURE:
            own = self.parts(name).values() if name in self.tasks else ()
            return any(p.grad is not None for parts in own for p in parts.parameters())


def find_registry(model: Any) -> Registry | None:
    """The registry of an injected model, or None.

    Raises:
        VisadaptError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise VisadaptError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return cast("Registry | None", unwrapped(model).__dict__.get("_visadapt"))


def registry_of(model: Any) -> Registry:
    """The registry of an injected model.

    Raises:
        VisadaptError: the model was never injected.
    """
    registry = find_registry(model)
    if registry is None:
        raise VisadaptError(f"this {type(model).__name__} has no tasks: call visadapt.inject(model, …) first")
    return registry


def facts_of(model: nn.Module) -> Facts:
    """The facts of a backbone: those that its registry keeps as long as they hold, or else new ones."""
    registry = find_registry(model)
    if registry is None:
        return Facts(unwrapped(model))
    if not registry.facts.hold():
        registry.facts = Facts(unwrapped(model))
    return registry.facts


def check_hosts(model: nn.Module, name: str) -> None:
    """Refuse a model in which a module with parts of a task was replaced: they would never act again.

    Raises:
        VisadaptError: the model has no such task, or a module was replaced.
    """
    registry = registry_of(model)
    there = set(own_modules(unwrapped(model)).values())
    for path in registry.task(name).hosts:
        if registry.hosts[path] not in there:
            raise VisadaptError(
                f"{path} was replaced after the inject (as nn.SyncBatchNorm.convert_sync_batchnorm does, or model.fc = "
                f"…), so task {name!r} does not act there: change the backbone first, then inject"
            )


def check_task_name(name: Any) -> None:
    """Refuse names that cannot name a module or a file."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}", name):
        raise VisadaptError(
            f"a task's name must be made of letters, digits, '_' and '-', up to 200, got {shown(name, 80)}"
        )
    if hasattr(nn.ModuleDict, str.__str__(name)) or str.__str__(name) in ("training", AUTO):
        raise VisadaptError(f"a task cannot be named {shown(name)}: that name means something else")


def prefix_of(path: str, name: str, part: nn.Module) -> str:
    """What the names of a part's tensors begin with: ``host.part.``.

    Weights of a task's own stand at the modules that own them, below the place (``root``) that their method names.
    They are called ``root.part.`` and what follows the root in the model.
    """
    root = getattr(part, "root", path)
    inner = relative(path, root)
    return "".join(f"{each}." for each in (root, name, inner) if each)


def named_tensors(registry: Registry, name: str) -> dict[str, Tensor]:
    """All parameters and persistent buffers that belong to a task, each once: ``host.part.tensor`` → tensor."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, parts in registry.parts(name).items():
        for key, part in parts.items():
            for inner, tensor in part.state_dict(keep_vars=True).items():
                # weights that are tied stand at several modules
                if id(tensor) not in seen:
                    found[prefix_of(path, key, part) + inner] = tensor
                seen.add(id(tensor))
    return found


class Parts(TaskModules):
    """The parts of all tasks at one host: task name → part name → module."""

    _registry: Registry
    _path: str = ""

    def forward(self, first: Any, *given: Any) -> Any:
        """Run for code that calls the parts by themselves: a torch.fx graph, or a loop over a container's children."""
        return called(self, first, *given) if isinstance(first, str) else run_in_turn(self, first)

    def _moved(self, task: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
        self._registry.unfilled.moved(task, before, now)

    def _replicate_for_data_parallel(self) -> nn.Module:
        # a replica runs in another thread, for the task that is active where it was made
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_registry"] = self._registry.held()
        return cast("nn.Module", replica)


def parts_of(host: nn.Module, task: str) -> Mapping[str, nn.Module]:
    """A task's parts at a module, by name; empty if it has none."""
    parts = host._modules.get(CHILD)
    own = parts._of(task) if isinstance(parts, Parts) else None
    return {} if own is None else cast("Mapping[str, nn.Module]", own._modules)


def check_filled(registry: Registry, tasks: Iterable[Any]) -> None:
    """Refuse tasks that were made on the meta device and have no values yet.

    Raises:
        VisadaptError: one has none, though the backbone has.
    """
    if registry.unfilled:
        registry.unfilled.check(tasks, lambda task: named_tensors(registry, task), is_on_meta(registry.facts.model))


def tasks(model: nn.Module) -> dict[str, Task]:
    """The tasks of a model by name, in the order they came; empty if it was never injected.

    Args:
        model: any model.

    Returns:
        A mapping from the task's name to its `Task`: labels, number of classes, norms and notes.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> visadapt.tasks(model)["flowers"].num_classes
        3
    """
    registry = find_registry(model)
    return {} if registry is None else dict(registry.tasks)
