"""``visadapt summary``."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

import visadapt
from visadapt.cli.given import refuse_unused
from visadapt.cli.options import (
    Build,
    Method,
    MethodOption,
    Norms,
    Where,
    Width,
    norm_policy,
    number,
    pairs,
    parse_method,
)
from visadapt.cli.output import show
from visadapt.data.hub import PLACES
from visadapt.opening.backbones import build_backbone
from visadapt.opening.repository import located
from visadapt.task_file import contents


def summary(
    target: Annotated[str, typer.Argument(help="Task file, hub:USER/REPO, or name of a backbone.")],
    method: Method = "Bottleneck",
    m: Width = None,
    option: MethodOption = None,
    norms: Norms = "auto",
    where: Where = None,
    build: Build = None,
) -> None:
    """Show what a task file holds, or what a method costs on a backbone.

    For a task file, its contents; for a backbone, what the method would train.
    """
    if target.partition("/")[0] not in PLACES or os.path.isfile(target):
        pages = [replace(contents(file.path), title=file.origin) for file in located(target)]
        refuse_unused(f"{target} is a task file", "method", "m", "option", "norms", "where", "build")
        for page in pages:
            show(page)
        return
    model = build_backbone(target, pairs(build, "--build"))
    terms = [number(term) for term in where or ()]
    visadapt.inject(model, parse_method(method, m, option), norms=norm_policy(norms), where=terms or None)
    show(visadapt.summary(model))
