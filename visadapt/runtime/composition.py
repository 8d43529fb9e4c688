"""Compositions: which sample is of which task, and which tasks act alike, computed once for all hosts.

Samples of tasks whose parts are alike form a cluster; at each host one batched product acts for a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from visadapt.runtime.division import grouped
from visadapt.runtime.profile import Held, Profile
from visadapt.runtime.registry import Registry


class Cluster:
    """The samples of a batch whose tasks' parts act alike.

    Attributes:
        profile: how they act; None for the bare backbone.
        names: of the tasks.
        number: which of them each sample of the cluster is of.
        samples: of the batch, by task.
    """

    def __init__(self, profile: Profile | None, tasks: Sequence[str | None]) -> None:
        self.profile = profile
        self.names, self.number, self.samples = grouped(tasks)


class Composition:
    """The tasks of a batch, one per sample.

    Attributes:
        tasks: a name per sample, None for the bare backbone.
        names: the distinct ones.
        number: which of them each sample is of.
        samples: of each of them.
        clusters: by how tasks' parts act.
        cluster_of: the number of each sample's cluster.
        members: the samples of each cluster.
        profiles: of the tasks.
        only: the one profile of all tasks, if there is one.
        training: the mode that the model was in when profiles were looked at.
    """

    def __init__(self, registry: Registry, tasks: Sequence[str | None], held: dict[str, Held]) -> None:
        self.tasks = tuple(tasks)
        self.names, self.number, self.samples = grouped(self.tasks)
        self._held = held
        self._registry = registry
        acts = [None if name is None else held[name].profile.acts for name in self.tasks]
        found, self.cluster_of, self.members = grouped(acts)
        self.clusters = [
            Cluster(profile, [self.tasks[i] for i in members])
            for profile, members in zip(found, self.members, strict=True)
        ]
        self.profiles = list(dict.fromkeys(held[name].profile for name in self.names if name is not None))
        self.only = self.profiles[0] if len(self.profiles) == 1 else None
        self._parts: dict[str, list[nn.ModuleDict | None]] = {}
        self.training = bool(registry.facts.model.__dict__["training"])

    def of(self, samples: Sequence[int]) -> Composition:
        """The composition of some samples of the batch."""
        return Composition(self._registry, [self.tasks[i] for i in samples], self._held)

    def all_roles(self) -> dict[str, frozenset[str]]:
        """The roles of the tasks' parts, by path of their host."""
        return {path: self.roles(path) for profile in self.profiles for path in profile.roles}

    def parts(self, path: str) -> list[nn.ModuleDict | None]:
        """Each distinct task's parts at a host; None for the bare backbone and for tasks without parts there."""
        found = self._parts.get(path)
        if found is None:
            held = self._held
            found = self._parts[path] = [None if name is None else held[name].parts.get(path) for name in self.names]
        return found

    def norms(self, path: str) -> list[Any] | None:
        """The class, mode and eps of the tasks' own norms at a host; None where tasks change it otherwise."""
        steps = [step for profile in self.profiles for step in profile.steps.get(path, ())]
        core = [step for step in steps if step.role in ("instead", "weights")]
        return None if any(step.name != "norm" for step in core) else [step.looks for step in core]

    def roles(self, path: str) -> frozenset[str]:
        """The roles of the tasks' parts at a host."""
        found: frozenset[str] = frozenset()
        for profile in self.profiles:
            found = found | profile.roles.get(path, found)
        return found


def composed(registry: Registry, tasks: Sequence[str | None]) -> Composition:
    """The composition of a batch; profiles that changed are found again.

    Raises:
        VisadaptError: the model has no such task.
    """
    held = {}
    for name in dict.fromkeys(tasks):
        if name is not None:
            task, changes = registry.task(name), registry.changes
            if task.held is not None and task.held.changes != changes:
                # modes that were set for all tasks reach the modules of each when it is next used
                registry.parts(name)
            if task.held is None or task.held.hosts != task.hosts or not task.held.holds():
                task.held = Held(registry.parts(name), registry.profiles)
            task.held.changes = changes
            held[name] = task.held
    return Composition(registry, tasks, held)
