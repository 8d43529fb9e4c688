"""Contenders: ways of adapting a backbone, each with its recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visadapt.backbone.site import Where
from visadapt.experiments.problems import Problem
from visadapt.injection import inject
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
        where: at which sites, as :func:`visadapt.inject` takes it.
        rates: learning rates to choose from on validation data; none or one, and the recipe's own is taken.
    """

    name: str
    method: Method
    recipe: Recipe
    norms: str = "affine"
    where: Where | None = None
    rates: tuple[float, ...] = ()

    def with_recipe(self, **changes: Any) -> Contender:
        """The same with some fields of its recipe changed."""
        return dataclasses.replace(self, recipe=self.recipe.replace(**changes))

    def described(self) -> dict[str, Any]:
        """Everything that its figures depend on, as JSON values."""
        return {
            "method": type(self.method).__name__,
            "options": self.method.options(),
            "norms": self.norms,
            "where": None if self.where is None else str(self.where),
            "recipe": dataclasses.asdict(self.recipe),
        }

    def put(self, problem: Problem, seed: int, model: nn.Module | None = None) -> nn.Module:
        """This contender's task, named as the problem, in a model; its new parts are drawn by ``seed``.

        Args:
            problem: that the task is for.
            seed: of what is drawn.
            model: a backbone with or without other tasks; None for a fresh one.
        """
        model = problem.fresh() if model is None else model
        classes = problem.splits.classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return inject(
                model,
                self.method,
                task=problem.name,
                num_classes=len(classes),
                labels=classes,
                norms=self.norms,
                where=self.where,
            )
