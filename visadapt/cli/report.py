"""``visadapt report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visadapt.cli.options import Force, unwritten
from visadapt.cli.output import say
from visadapt.report import write


def report(
    results: Annotated[Path, typer.Argument(help="The folder that experiment wrote to, or a .csv file of results.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to, without a suffix, such as docs/results.")],
    title: Annotated[str, typer.Option(help="Of both pages.")] = "Results",
    force: Force = False,
) -> None:
    """Writes figures, tables and pages of results.

    OUT.md with its figures in OUT/, and OUT.html, which needs no other file and no network.
    """
    for suffix in (".md", ".html"):
        unwritten(Path(f"{out}{suffix}"), force)
    for path in write(results, out, title):
        say(str(path))
