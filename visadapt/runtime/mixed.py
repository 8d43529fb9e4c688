"""Mixed batches at one module: every sample with the parts of its own task, in one pass of the backbone.

A host runs once over the whole batch wherever the tasks only add to it. Parts that know how to act for many tasks at
once (a class with ``rowwise``) do so by one batched product; all others act task by task, each on its own samples, so
that train-mode statistics see their own task's samples only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import Key, mapped, with_first
from visadapt.backbone.entry import Entry
from visadapt.backbone.modules import REGISTRY
from visadapt.backbone.rows import Fact, Lying
from visadapt.backbone.shared_pass import spread
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.methods.layers import is_hooked
from visadapt.methods.stacking import Rows, Stacked, shares_memory
from visadapt.runtime.by_row import run_by_row
from visadapt.runtime.composition import Cluster, Composition
from visadapt.runtime.division import Division, UnfitError, grouped
from visadapt.runtime.door import enter, enter_by, is_outside, outside
from visadapt.runtime.mixed_norms import stack_norms
from visadapt.runtime.profile import Step
from visadapt.runtime.registry import Mixed, Named, Parts
from visadapt.runtime.roles import AROUND, around, core, is_fresh, run

NONE = nn.ModuleDict()
"""The parts of the bare backbone."""


class Here:
    """A batch of mixed tasks at one host.

    Args:
        host: the module.
        parts: what it carries.
        tasks: one per sample, None for the bare backbone.
    """

    def __init__(self, host: nn.Module, parts: Parts, tasks: Named) -> None:
        composition: Composition = tasks.composition
        self.parts, self.composition = parts, composition
        self.path = parts._path
        self.place = self.path or type(host).__name__
        self.roles = composition.roles(self.path)
        self._tasks = tasks
        self._registry = parts._registry
        # code that a host without children runs uses no task, except through the weights that it computes with
        self._leaf = len(host._modules) == 1 and "weights" not in self.roles
        if self.roles:
            known = self._facts()
            self.inputs: dict[Key, Fact] = known.inputs
            self.outputs: dict[Key, Fact] = known.outputs
        self.shared = tasks.shared if isinstance(tasks, Mixed) else None

    def _facts(self) -> Any:
        """The row facts of this host: for this batch or, while a graph is being traced, for all batches."""
        if isinstance(self._tasks, Mixed):
            known = self._tasks.rows.hosts.get(self.path)
            if known is None or not known.known:
                raise UnfitError(f"it is not known which rows belong to which sample at {self.place}")
            return known
        known = self._registry.facts.batches.hosts.get(self.path)
        if not (is_tracing() or torch._C._current_graph_task_id() != -1):
            raise outside(self.place)
        if known is None or not known.known:
            raise VisadaptError(
                f"it is not known which rows belong to which sample at {self.place}, and a graph cannot run one task "
                "at a time: call the model without torch.compile"
            )
        return known

    def is_first(self) -> bool:
        """Whether one sample becomes one row per task here."""
        return self.shared is not None and self.shared.place == self.path

    def spread(self, given: Any, facts: dict[Key, Fact]) -> Any:
        """Repeat a tensor of the one sample for every task."""
        return spread(given, facts, len(self.composition.tasks))

    def groups(self) -> tuple[list[nn.ModuleDict], Division]:
        """The parts of each group of samples, and which group each sample is in."""
        composition = self.composition
        number, samples = composition.number, composition.samples
        own = composition.parts(self.path)
        if None in own:
            # tasks without parts here are one group, with the bare backbone
            own, number, samples = grouped([own[n] for n in number])
        return [NONE if parts is None else parts for parts in own], Division(number, self.place, samples)

    def apart(self, function: Callable[[nn.ModuleDict, Any, Any], Any], args: Any, kwargs: Any) -> Any:
        """Run ``function(parts, args, kwargs)`` for each group on its own rows and join the results."""
        outs = []
        groups, division = self.groups()
        rows = self._rows(division, args, kwargs)
        if rows is not None:
            each = zip(groups, rows.divided(args[0]), strict=True)
            return division.join([function(parts, (own,), kwargs) for parts, own in each], self.outputs)
        for group, parts in enumerate(groups):
            own_args, own_kwargs = division.share((args, kwargs), self.inputs, group)
            if self._leaf:
                outs.append(function(parts, own_args, own_kwargs))
                continue
            # what runs within sees the rows of one group only, and so their tasks only
            inner = self.composition.of(division.samples[group])
            if len(inner.names) == 1:
                tasks: Any = inner.names[0]
            else:
                given = self._tasks
                tasks = Mixed.within(inner, given.rows) if isinstance(given, Mixed) else Named.of(inner)
            with self._registry.within(tasks):
                outs.append(function(parts, own_args, own_kwargs))
        return division.join(outs, self.outputs)

    def _rows(self, division: Division, args: Any, kwargs: Any) -> Rows | None:
        """Whose rows are whose, where one tensor is all that has to be divided; None elsewhere."""
        fact = self.inputs.get((0, 0))
        alone = self._leaf and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        # with autograd, a write to one group's input must not count as one to the others'
        if not alone or torch.is_grad_enabled() or not isinstance(fact, Lying) or fact.axis != 0:
            return None
        return division.rows(args[0].shape[0], args[0].device, fact)

    def before(self, args: Any) -> Any:
        """The host's arguments, changed by each task's parts on its own rows.

        Returns:
            The arguments; None where some part cannot act on the whole batch at once.
        """
        clusters = self.composition.clusters
        steps = [() if c.profile is None else c.profile.before.get(self.path, ()) for c in clusters]
        if not args or not isinstance(args[0], Tensor) or any(not step.rowwise for own in steps for step in own):
            return None
        given = [self.inputs.get((0, i)) if isinstance(arg, Tensor) else None for i, arg in enumerate(args)]
        division = Division(self.composition.cluster_of, self.place, self.composition.members)
        for number, (cluster, own) in enumerate(zip(clusters, steps, strict=True)):
            if own:
                args = self._before(cluster, own, division, number, args, given)
        return args

    def _before(
        self, cluster: Cluster, steps: Any, division: Division, number: int, args: Any, given: list[Fact | None]
    ) -> Any:
        whole = len(self.composition.clusters) == 1
        rows = {
            i: division.rows(arg.shape[0], arg.device, given[i])
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor)
        }
        own = args if whole else tuple(rows[i].take(arg, number) if i in rows else arg for i, arg in enumerate(args))
        within = Division(cluster.number, self.place, cluster.samples)
        inner = within.rows(own[0].shape[0], own[0].device, given[0])
        changed, held = own, self._held(cluster)
        for step in steps:
            parts = [each.__dict__["_modules"][step.name] for each in held]
            changed = cast("Any", parts[0]).rowwise(changed, Stacked(parts, inner))
        if whole:
            return changed
        return tuple(
            arg if new is old else rows[i].put(arg, {number: new})
            for i, (arg, old, new) in enumerate(zip(args, own, changed, strict=True))
        )

    def act(self, out: Any, first: Any, fresh: bool, key: Key = ()) -> Any:
        """Apply all parts that act on the host's output, each task's on its own rows.

        Args:
            out: the output.
            first: the host's first argument.
            fresh: whether nothing else holds the output.
            key: path of ``out`` in the host's output.
        """
        if self.roles.isdisjoint(AROUND):
            return out
        if not isinstance(out, Tensor):
            return with_first(out, lambda step, inner: self.act(inner, first, False, (*key, step)))
        output, given = self.outputs.get(key), self.inputs.get((0, 0))
        clusters = self.composition.clusters
        if len(clusters) == 1:
            return self._cluster(clusters[0], out, first, output, given, fresh)
        division = Division(self.composition.cluster_of, self.place, self.composition.members)
        rows = division.rows(out.shape[0] if out.ndim else 0, out.device, output)
        values = {}
        for number, cluster in enumerate(clusters):
            steps = () if cluster.profile is None else cluster.profile.around.get(self.path, ())
            if not steps:
                continue
            own = first
            if any(step.role == "beside" for step in steps):
                own = division.rows(first.shape[0], first.device, given).take(first, number)
            changed = self._cluster(cluster, rows.take(out, number), own, output, given, False)
            if any(step.role != "watch" for step in steps):
                values[number] = changed
        return rows.put(out, values) if values else out

    def _held(self, cluster: Cluster) -> list[nn.ModuleDict]:
        names, parts = self.composition.names, self.composition.parts(self.path)
        if cluster.names == names:
            return cast("list[nn.ModuleDict]", parts)
        by_name = dict(zip(names, parts, strict=True))
        return [cast("nn.ModuleDict", by_name[name]) for name in cluster.names]

    def _cluster(
        self, cluster: Cluster, out: Tensor, first: Any, output: Fact | None, given: Fact | None, fresh: bool
    ) -> Tensor:
        assert cluster.profile is not None
        steps = cluster.profile.around.get(self.path, ())
        if not steps:
            return out
        division = Division(cluster.number, self.place, cluster.samples)
        rows = division.rows(out.shape[0] if out.ndim else 0, out.device, output)
        held = self._held(cluster)
        fresh = fresh and not any(step.role == "watch" for step in steps)
        for step in steps:
            # not by index, which takes a Python call per task
            parts = [own.__dict__["_modules"][step.name] for own in held]
            if step.role == "beside":
                beside = division.rows(first.shape[0], first.device, given)
                out = _beside(step, parts, out, first, rows, beside)
            else:
                out = _on_output(step, parts, out, rows, fresh)
        return out


def _beside(step: Step, parts: list[nn.Module], out: Tensor, first: Any, rows: Rows, given: Rows) -> Tensor:
    one: Any = parts[0]
    if step.rowwise:
        return cast("Tensor", out + one.rowwise(first, Stacked(parts, given)))
    if hasattr(type(one), "stacked"):
        return cast("Tensor", out + type(one).stacked(parts, given, first))
    each = {g: around(part, rows.take(out, g), (given.take(first, g),)) for g, part in enumerate(parts)}
    return rows.put(out, each)


def _on_output(step: Step, parts: list[nn.Module], out: Tensor, rows: Rows, fresh: bool) -> Tensor:
    one: Any = parts[0]
    if step.rowwise:
        own = Stacked(parts, rows)
        if step.role == "watch":
            one.rowwise(out, own)
            return out
        if fresh and getattr(type(one), "overwrites", False) and not any(map(is_hooked, parts)):
            return cast("Tensor", one.rowwise(out, own, fresh=True))
        return cast("Tensor", one.rowwise(out, own))
    if hasattr(type(one), "stacked"):
        return cast("Tensor", type(one).stacked(parts, rows, out))
    if step.role == "watch":
        for g, part in enumerate(parts):
            part(rows.take(out, g))
        return out
    return rows.put(out, {g: around(part, rows.take(out, g), ()) for g, part in enumerate(parts)})


def _of_one(here: Here, out: Any) -> Any:
    """Apply parts that act on the output of a host which ran once for the one sample of all tasks."""
    changed = here.act(here.spread(out, here.outputs), None, False)
    if not here.is_first():
        # all of them only watch
        return out
    # later code may write to it, and rows of the bare backbone may still share memory
    return mapped(
        lambda _, leaf: leaf.contiguous() if isinstance(leaf, Tensor) and shares_memory(leaf) else leaf, changed
    )


def run_mixed(host: nn.Module, plain: type[nn.Module], parts: Parts, tasks: Any, args: Any, kwargs: Any) -> Any:
    """A host's forward for a batch of mixed tasks; see the module."""
    if REGISTRY in host.__dict__ and not isinstance(tasks, Mixed) and not is_tracing():
        return enter(host, parts._registry, tasks, args, kwargs)
    if is_outside(tasks) and isinstance(tasks, Named) and not is_tracing():
        return enter_by(parts._registry, Entry(parts._path), tasks, host.forward, args, kwargs)
    if isinstance(tasks, str) or not (isinstance(tasks, Named) or is_tracing()):
        raise outside(parts._path)
    if not isinstance(tasks, Named):
        raise VisadaptError(
            "the tasks of a mixed batch were chosen before the model was copied: choose them again for the copy"
        )
    if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled() and not torch.compiler.is_exporting():
        out = run_by_row(host, plain, parts, tasks, args, kwargs)
        if out is not None:
            return out
    here = Here(host, parts, tasks)
    if not here.roles:
        return plain.forward(host, *args, **kwargs)
    if here.shared is not None:
        if here.is_first() and here.shared.at_input:
            args, kwargs = here.spread((args, kwargs), here.inputs)
        elif here.is_first() or here.path in here.shared.single:
            return _of_one(here, plain.forward(host, *args, **kwargs))
    if "before" in here.roles:
        changed = here.before(args)
        if changed is None:
            # each group with an input of its own: apart from the start
            return here.apart(lambda group, a, k: run(host, plain, group, a, k), args, kwargs)
        args = changed
    if here.roles & {"instead", "weights"}:
        out = None
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            groups, division = here.groups()
            x = args[0]
            rows = division.rows(x.shape[0] if x.ndim else 0, x.device, here.inputs.get((0, 0)))
            out = stack_norms(host, plain, here.composition.norms(here.path), groups, rows, x)
        if out is None:
            out = here.apart(lambda group, a, k: core(host, plain, group, a, k), args, kwargs)
        fresh = is_fresh(nn.Linear)
    else:
        out = plain.forward(host, *args, **kwargs)
        fresh = is_fresh(plain)
    return here.act(out, args[0] if args else None, fresh)
