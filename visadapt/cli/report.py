"""``visadapt report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visadapt.cli.options import Force, check_writable
from visadapt.cli.output import say
from visadapt.errors import VisadaptError
from visadapt.report import write


def report(
    results: Annotated[Path, typer.Argument(help="Folder that experiment wrote to, or a .csv file of results.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output path without a suffix, such as docs/results.")],
    title: Annotated[
        str | None, typer.Option(help="Title of both pages; by default it names networks and counts.")
    ] = None,
    force: Force = False,
) -> None:
    """Write figures, tables and pages of experiment results.

    Writes OUT.md with its figures in OUT/, and a self-contained OUT.html.
    """
    if not out.name:
        raise VisadaptError(f"--out must have the name of a file, got {str(out)!r}")
    for suffix in (".md", ".html"):
        check_writable(Path(f"{out}{suffix}"), force)
    for path in write(results, out, title):
        say(str(path))
