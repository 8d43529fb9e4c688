"""Contenders: ways of adapting a backbone, each with its recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from visadapt.arguments import check_fields, takes
from visadapt.backbone.site import Where
from visadapt.backbone.where import terms_of
from visadapt.checks import check_choice, check_count, check_positive
from visadapt.errors import VisadaptError
from visadapt.experiments.problems import Problem
from visadapt.experiments.result_check import check_name
from visadapt.injection import inject
from visadapt.methods import Method
from visadapt.methods.policy import NORM_POLICIES, NormPolicy
from visadapt.training import Recipe
from visadapt.training.recipe import EARLIER


@dataclass(frozen=True)
class Contender:
    """One way of adapting a backbone.

    Args:
        name: name in results and tables.
        method: the method to inject.
        recipe: how to train it.
        norms: norm policy, as `visadapt.inject` takes it.
        where: sites to adapt, as `visadapt.inject` takes them.
        rates: learning rates to choose from on validation data; with fewer than two, the recipe's own is used.
        extend: try further rates while the best is the first or the last of them.
        lengths: numbers of epochs to choose from on validation data, in increasing order; with fewer than two, the
            recipe's own is used.
        variants: methods to try in place of ``method``, at the chosen rate and length; the best on validation data is
            used, under the same name.
        validated: keep the state after the epoch with the best validation score; with a recipe that is
            ``head_first``, the linear probe is one of these states, so that no task ends below its own probe there.

    Raises:
        VisadaptError: a rate or a number of epochs is not positive, or the numbers of epochs do not increase.

    Examples:
        >>> from visadapt.experiments import Contender
        >>> small = Contender("small", visadapt.Bottleneck(4), Recipe(epochs=2), rates=(1e-3, 3e-3))
        >>> small.name, small.recipe.epochs
        ('small', 2)
    """

    name: str
    method: Method
    recipe: Recipe
    norms: str = "affine"
    where: Where | None = None
    rates: tuple[float, ...] = ()
    extend: bool = False
    lengths: tuple[int, ...] = ()
    variants: tuple[Method, ...] = ()
    validated: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "where")
        check_name(self.name, "name")
        terms_of(self.where)
        check_choice(self.norms, NORM_POLICIES, "norms")
        for rate in self.rates:
            check_positive(rate, "a rate of rates")
        for length in self.lengths:
            check_count(length, "a number of epochs of lengths")
        if list(self.lengths) != sorted(set(self.lengths)):
            raise VisadaptError(f"lengths must be numbers of epochs in increasing order, got {self.lengths!r}")

    def with_recipe(self, **changes: Any) -> Contender:
        """Return a copy with some fields of its recipe changed."""
        return dataclasses.replace(self, recipe=self.recipe.replace(**changes))

    def described(self) -> dict[str, Any]:
        """Return everything that its results depend on, as JSON values."""
        recipe = dataclasses.asdict(self.recipe)
        # results from before a recipe had an option keep their keys
        recipe = {name: value for name, value in recipe.items() if name not in EARLIER or value != EARLIER[name]}
        return {
            "method": type(self.method).__name__,
            "options": self.method.options(),
            "norms": self.norms,
            "where": None if self.where is None else str(self.where),
            "recipe": recipe,
            **({"validated": True} if self.validated else {}),
        }

    def setting(self) -> dict[str, Any]:
        """Return `described` without what validation data chooses: learning rate, length and variant."""
        described = self.with_recipe(lr=1.0).described()
        if len(self.lengths) > 1:
            described["recipe"]["epochs"] = list(self.lengths)
        if self.variants:
            methods = {str(method): method.options() for method in (self.method, *self.variants)}
            described["options"] = [methods[name] for name in sorted(methods)]
        return described

    @takes()
    def with_variant(self, method: Method) -> Contender:
        """Return a copy with one of its variants as the method; the former method becomes a variant."""
        others = (self.method, *self.variants)
        return dataclasses.replace(self, method=method, variants=tuple(m for m in others if m != method))

    @takes()
    def put(self, problem: Problem, seed: int, model: nn.Module | None = None) -> nn.Module:
        """Inject this contender's task into a model, under the name of the problem.

        Args:
            problem: the problem that the task solves.
            seed: seed of the new parameters; the global random state is left unchanged.
            model: a backbone, with or without other tasks; None for a new one.

        Returns:
            The model.

        Raises:
            VisadaptError: the method cannot be injected into this backbone.
        """
        model = problem.fresh() if model is None else model
        classes = problem.splits.classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return inject(
                model,
                self.method,
                task=problem.name,
                num_classes=len(classes) or 1,
                labels=classes or None,
                norms=cast("NormPolicy", self.norms),
                where=self.where,
            )
