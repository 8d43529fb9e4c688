"""What each task costs: parameters, bytes, and its fraction of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from visadapt.backbone.structure import STRUCTURE
from visadapt.runtime.measured import measured
from visadapt.runtime.registry import Registry, facts_of, named_tensors, registry_of
from visadapt.table import Table


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
        fraction: adapters, norms and ``also``, over the backbone without its head.
        bytes: of all its tensors.
        also: parameters of its copies of further modules (``train_also``).
        metrics: its scores after training, if its notes hold them.
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
    also: int = 0
    metrics: str = ""

    @property
    def trained(self) -> int:
        """All parameters of the task, head included."""
        return self.adapters + self.norms + self.head + self.also


class Summary(dict[str, TaskSummary]):
    """Summaries by task; prints as a table."""

    def __init__(self, rows: dict[str, TaskSummary], backbone: int, active: Any, precision: str = "") -> None:
        super().__init__(rows)
        self.backbone = backbone
        """Parameters of the backbone without its head."""
        self.active = active
        self.precision = precision
        """How `visadapt.lean` keeps the backbone's weights and computes; empty for its own precision."""

    def table(self) -> Table:
        """One row per task, the active one with a star; columns that are empty for all tasks are left out."""
        also, scored = any(row.also for row in self.values()), any(row.metrics for row in self.values())
        rows = [
            (
                f"{row.task} *" if row.task == self.active else row.task,
                row.methods,
                row.sites,
                f"{row.adapters:,}",
                f"{row.norms:,} ({row.norm_policy})",
                f"{row.head:,}" if row.head else "backbone's",
                *([f"{row.also:,}"] if also else []),
                f"{100 * row.fraction:.2f} %",
                f"{row.bytes / 1000:,.0f} kB",
                *([row.metrics or "–"] if scored else []),
            )
            for row in self.values()
        ]
        columns = ("task", "methods", "sites", "adapters", "norms", "head", *(("also",) if also else ()))
        headings = (*columns, "of backbone", "size", *(("scored",) if scored else ()))
        facts = ", ".join(filter(None, (f"{self.backbone:,} parameters", "frozen", self.precision)))
        return Table(headings, rows, title=f"backbone without head: {facts}")

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def summary(model: nn.Module) -> Summary:
    """Per task: parameters, fraction of the backbone, bytes, norms, head. Prints as a table.

    Args:
        model: an injected model.

    Returns:
        A mapping from the task's name to its costs: parameters as counts, sizes in bytes.

    Raises:
        VisadaptError: the model was never injected.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> flowers = visadapt.summary(model)["flowers"]
        >>> flowers.methods, flowers.sites, flowers.norm_policy, flowers.num_classes
        ('Bottleneck(m=4)', 8, 'affine', 3)
    """
    registry = registry_of(model)
    with STRUCTURE:
        whole = facts_of(model).size
        rows = {name: _summed(registry, name, whole) for name in registry.tasks}
        return Summary(rows, whole, registry.current(), "" if registry.lean is None else registry.lean.told)


def _summed(registry: Registry, name: str, whole: int) -> TaskSummary:
    task = registry.task(name)
    count = {"norm": 0, "head": 0, "also": 0, "adapters": 0}
    seen: set[nn.Parameter] = set()
    for parts in registry.parts(name).values():
        for part, module in parts.items():
            key = part if part in count else "adapters"
            # weights that are tied stand at several modules
            own = set(module.parameters()) - seen
            count[key] += sum(p.numel() for p in own)
            seen |= own
    size = sum(t.numel() * t.element_size() for t in named_tensors(registry, name).values())
    return TaskSummary(
        task=name,
        methods=" + ".join(str(placement.method) for placement in task.placements),
        sites=sum(len(placement.sites) for placement in task.placements),
        adapters=count["adapters"],
        norms=count["norm"],
        norm_policy=task.norms,
        head=count["head"],
        num_classes=task.num_classes,
        fraction=(count["adapters"] + count["norm"] + count["also"]) / max(whole, 1),
        bytes=size,
        also=count["also"],
        metrics=", ".join(f"{name} {value}" for name, value in measured(task.notes).items()),
    )
