"""Contenders: ways of adapting a backbone, each with its recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visadapt.experiments.problem import Problem
from visadapt.inject import inject
from visadapt.methods import Method
from visadapt.training import Recipe


@dataclass(frozen=True)
class Contender:
    """One way of adapting.

    Args:
        name: in tables.
        method: what is put in.
        recipe: how it is trained.
        norms: what the task owns of the norms.
    """

    name: str
    method: Method
    recipe: Recipe
    norms: str = "affine"

    @property
    def way(self) -> str:
        """The method's name, without its options."""
        return type(self.method).__name__

    def with_recipe(self, **changes: Any) -> Contender:
        """The same with some fields of its recipe changed."""
        return dataclasses.replace(self, recipe=self.recipe.replace(**changes))

    def described(self) -> dict[str, Any]:
        """Everything that its figures depend on, as JSON values."""
        options = {"method": self.way, "options": self.method.options(), "norms": self.norms}
        return {**options, "recipe": dataclasses.asdict(self.recipe)}

    def put(self, problem: Problem, seed: int) -> nn.Module:
        """A fresh backbone with this contender's task, named as the problem; its new parts are drawn by ``seed``."""
        model = problem.fresh()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classes = len(problem.labels)
            return inject(model, self.method, task=problem.name, num_classes=classes, labels=problem.labels,
                          norms=self.norms)  # fmt: skip
