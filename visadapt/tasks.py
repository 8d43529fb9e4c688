"""Tasks in use: which one is meant, what it trains, what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visadapt import heads
from visadapt.errors import VisadaptError
from visadapt.registry import _USING, AUTO, Registry, Task, check_hosts, find_registry, joined, registry_of, unwrapped
from visadapt.sites import parameter_count
from visadapt.table import Table


def activate(model: nn.Module, task: str | Sequence[str | None] | None) -> nn.Module:
    """Chooses the task that the model performs from now on, in every thread that has not chosen by :func:`using`.

    Args:
        model: an injected model.
        task: its name, None for the bare backbone, a list that names one for each sample of the batches
            to come, or ``"auto"`` for the decider's choice.

    Returns:
        The same model.

    Raises:
        VisadaptError: there is no such task; the nearest is named.
    """
    registry = registry_of(model)
    registry.active, registry.hidden = _checked(model, registry, task), False
    return model


@contextmanager
def using(model: nn.Module, task: str | Sequence[str | None] | None) -> Iterator[nn.Module]:
    """Chooses a task within a ``with`` block, for this thread (or async task) only.

    With a list, every sample of the batch has its own task: adapters, norms and head. Heads of different widths are
    padded with −inf; :func:`visadapt.split` takes the logits apart again.

    Gradient checkpointing runs parts of the forward again in backward, which has to be inside the block too; on a GPU,
    where backward is another thread's, choose by :func:`activate`.

    Args:
        model: an injected model.
        task: its name, None for the bare backbone, a list that names one for each sample, or ``"auto"``: the model's
            decider chooses for each sample (see :func:`visadapt.fit_decider`).

    Yields:
        The same model.

    Raises:
        VisadaptError: there is no such task (the nearest is named), or, in the forward, the batch has another length
            than the list.
    """
    registry = registry_of(model)
    token = _USING.set({**(_USING.get() or {}), id(registry): _checked(model, registry, task)})
    try:
        yield model
    finally:
        _USING.reset(token)


def _checked(model: nn.Module, registry: Registry, task: Any) -> Any:
    if task is None or (isinstance(task, str) and task != AUTO):
        return None if task is None else registry.task(task).name
    if not isinstance(task, Sequence) or not task:
        raise VisadaptError(f"expected a task's name, None, or a list with one name a sample; got {task!r}")
    if task == AUTO:
        if registry.decider is None:
            raise VisadaptError("'auto' needs a decider: visadapt.fit_decider makes one, load_decider reads one")
        names: Any = AUTO
    else:
        names = tuple(None if name is None else registry.task(name).name for name in task)
    guard(model)
    return names


def guard(model: nn.Module) -> None:
    """Has a model look at the batches that come, once it was asked for a list of tasks or for the decider's choice."""
    registry = registry_of(model)
    if not registry.guards:
        backbone = unwrapped(model)
        registry.guards = (
            backbone.register_forward_pre_hook(_enter, with_kwargs=True),
            backbone.register_forward_hook(_leave, always_call=True),
        )


def _enter(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a forward of the whole model: lets the decider choose, and checks that there is one task a sample.

    A wrong length can only be told apart from windows (Swin cuts each sample into many) at the model's own door.
    """
    registry = registry_of(model)
    names = registry.current()
    if names == AUTO:
        from visadapt.decider import decide

        chosen = _Decided(decide(model, kwargs if kwargs and not args else args))
        chosen.token = _USING.set({**(_USING.get() or {}), id(registry): chosen})
    elif isinstance(names, tuple):
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is not None and first.shape[0] != len(names):
            raise VisadaptError(f"{len(names)} tasks were named for a batch of {first.shape[0]}: name one a sample")


def _leave(model: nn.Module, args: Any, out: Any) -> None:
    """After it: the next batch is decided anew."""
    chosen = registry_of(model).current()
    if isinstance(chosen, _Decided):
        _USING.reset(chosen.token)


class _Decided(tuple[str, ...]):
    """The tasks that the decider chose for one batch, and how to forget them."""

    token: Any


def active(model: nn.Module) -> str | tuple[str | None, ...] | None:
    """The task that a forward here and now performs; None for the bare backbone; a tuple for a mixed batch.

    Raises:
        VisadaptError: the model was never injected.
    """
    name: str | tuple[str | None, ...] | None = registry_of(model).current()
    return name


def tasks(model: nn.Module) -> dict[str, Task]:
    """The tasks of a model by name, in the order they came; empty if it was never injected."""
    registry = find_registry(model)
    return {} if registry is None else dict(registry.tasks)


def named_parameters(model: nn.Module, task: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A task's parameters by name (``host.part.tensor``, as in its file), for optimisers with groups.

    Raises:
        VisadaptError: there is no such task, or a module that holds its parts was replaced.
    """
    check_hosts(model, task)
    for path, parts in registry_of(model).parts(task).items():
        for name, parameter in parts.named_parameters():
            yield joined(path, name), parameter


def parameters(model: nn.Module, task: str | None = None) -> list[nn.Parameter]:
    """A task's parameters, for the optimiser: adapters, norm copies and head, nothing of the backbone.

    Args:
        model: an injected model.
        task: its name; None for the active one.

    Raises:
        VisadaptError: there is no such task, or none is active.
    """
    return [parameter for _, parameter in named_parameters(model, active(model) if task is None else task)]  # type: ignore[arg-type]


def trainable(model: nn.Module, task: str | Sequence[str]) -> nn.Module:
    """Lets gradients flow to these tasks only, as DDP wants it, which refuses parameters that a step does not use.

    Args:
        model: an injected model.
        task: a name, or several for a training batch of mixed tasks.

    Returns:
        The same model.

    Raises:
        VisadaptError: there is no such task.
    """
    registry = registry_of(model)
    several = isinstance(task, Sequence) and not isinstance(task, str)
    wanted = {registry.task(name).name for name in (task if several else [task])}
    for name in registry.tasks:
        for parts in registry.parts(name).values():
            parts.requires_grad_(name in wanted)
    return model


@dataclass(frozen=True)
class TaskSummary:
    """What a task costs, in numbers.

    Attributes:
        task: its name.
        methods: what was put in, with options.
        sites: number of sites with an adapter.
        adapters: parameters of the adapters.
        norms: parameters of its norm copies.
        norm_policy: ``frozen``, ``affine`` or ``full``.
        head: parameters of its head.
        num_classes: width of its head.
        fraction: adapters and norms, over the backbone without its head.
        bytes: of all its tensors.
    """

    task: str
    methods: str
    sites: int
    adapters: int
    norms: int
    norm_policy: str
    head: int
    num_classes: int | None
    fraction: float
    bytes: int

    @property
    def trained(self) -> int:
        """All parameters of the task, head included."""
        return self.adapters + self.norms + self.head


class Summary(dict[str, TaskSummary]):
    """Summaries by task; prints as a table."""

    def __init__(self, rows: dict[str, TaskSummary], backbone: int, active: Any) -> None:
        super().__init__(rows)
        self.backbone = backbone
        """Parameters of the backbone without its head."""
        self.active = active

    def table(self) -> Table:
        """One row a task; the active one carries a star."""
        rows = [
            (
                f"{row.task} *" if row.task == self.active else row.task,
                row.methods,
                row.sites,
                f"{row.adapters:,}",
                f"{row.norms:,} ({row.norm_policy})",
                f"{row.head:,}" if row.head else "backbone's",
                f"{100 * row.fraction:.2f} %",
                f"{row.bytes / 1000:,.0f} kB",
            )
            for row in self.values()
        ]
        headings = ("task", "methods", "sites", "adapters", "norms", "head", "of backbone", "size")
        return Table(headings, rows, title=f"backbone without head: {self.backbone:,} parameters, frozen")

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def backbone_size(model: nn.Module) -> int:
    """Number of parameters of the backbone without its head: the whole that fractions are parts of."""
    head = heads.find_head(model)
    without = sum(parameter_count(model.get_submodule(path)) for path in head.modules) if head else 0
    return parameter_count(model) - without


def summary(model: nn.Module) -> Summary:
    """Per task: parameters, fraction of the backbone, bytes, norms, head. Prints as a table.

    Raises:
        VisadaptError: the model was never injected.
    """
    registry = registry_of(model)
    whole = backbone_size(unwrapped(model))
    return Summary({name: _summed(registry, name, whole) for name in registry.tasks}, whole, registry.current())


def _summed(registry: Registry, name: str, whole: int) -> TaskSummary:
    task = registry.task(name)
    count = {"norm": 0, "head": 0, "adapters": 0}
    size = 0
    for parts in registry.parts(name).values():
        for part, module in parts.items():
            key = part if part in ("norm", "head") else "adapters"
            count[key] += sum(p.numel() for p in module.parameters())
            size += sum(t.numel() * t.element_size() for t in module.state_dict().values())
    return TaskSummary(
        task=name,
        methods=" + ".join(str(placement.method) for placement in task.placements),
        sites=sum(len(placement.sites) for placement in task.placements),
        adapters=count["adapters"],
        norms=count["norm"],
        norm_policy=task.norms,
        head=count["head"],
        num_classes=task.num_classes,
        fraction=(count["adapters"] + count["norm"]) / max(whole, 1),
        bytes=size,
    )
