"""``visadapt summary``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import visadapt
from visadapt.cli.models import shaped
from visadapt.cli.options import Build, Method, MethodOption, Norms, Where, Width, number, pairs
from visadapt.cli.output import show
from visadapt.cli.putting import chosen
from visadapt.data.hub import PLACES
from visadapt.task_file import contents


def summary(
    target: Annotated[str, typer.Argument(help="A task's file, or a backbone's name.")],
    method: Method = "Bottleneck",
    m: Width = None,
    option: MethodOption = None,
    norms: Norms = "affine",
    where: Where = None,
    build: Build = None,
) -> None:
    """Says what a file holds, or what a method costs.

    Of a task's file, what is in it; of a backbone, what the method would train there.
    """
    if target.partition("/")[0] not in PLACES or Path(target).is_file():
        show(contents(target))
        return
    model = shaped(target, pairs(build, "--build"))
    terms = [number(term) for term in where or ()]
    visadapt.inject(model, chosen(method, m, option), norms=norms, where=terms or None)
    show(visadapt.summary(model))
