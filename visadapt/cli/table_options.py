"""Options of tables that several commands take: one record, from the command line and from a task's notes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from visadapt.data.tables import Format
from visadapt.errors import VisadaptError
from visadapt.typed import from_json


@dataclass(frozen=True)
class TableOptions:
    """How a table of texts or of image files is read; None leaves the loader's default.

    The annotations are the options of the command line, see `with_table`; the values are also what a task file notes
    of the table that it was trained on.
    """

    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="COLUMN", help="Text column, by name or by number from 0; give it twice for pairs."
        ),
    ] = None
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="COLUMN", help="Column of image files in a table, by name or by number from 0."
        ),
    ] = None
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Label column, by name or number.")] = (
        None
    )
    regression: Annotated[bool | None, typer.Option("--regression", help="The labels are real values.")] = None
    multi_label: Annotated[
        str | None,
        typer.Option(
            "--multi-label",
            metavar="SEPARATOR",
            help="A sample has any number of labels, separated by this in its cell.",
        ),
    ] = None
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether the first line holds the column names.")
    ] = None
    delimiter: Annotated[
        str | None, typer.Option(help="Column separator of tables; default: a comma in .csv, a tab in other files.")
    ] = None
    encoding: Annotated[
        str | None,
        typer.Option(help="Encoding of tables and texts, such as latin-1; default: UTF-8, or UTF-16 if marked."),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not left to the loader, by name: its keyword arguments, and a task's note ``table``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in (None, [])}

    @property
    def form(self) -> Format:
        """How the table is written."""
        return Format(**{name: self.given[name] for name in ("header", "delimiter", "encoding") if name in self.given})

    def over(self, noted: Any) -> TableOptions:
        """Return the options that a task notes, with those given here instead.

        Args:
            noted: the task's note ``table``; None if it has none.

        Raises:
            VisadaptError: the note does not hold options of a table.
        """
        try:
            earlier = TableOptions() if noted is None else from_json(TableOptions, noted)
        except TypeError as error:
            raise VisadaptError(
                f"the note 'table' of the task must hold options of a table, got {noted!r:.100} ({error})"
            ) from error
        return dataclasses.replace(earlier, **self.given)


def with_table(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a table, which it takes as one argument ``table``.

    Args:
        names: of the fields of `TableOptions` that the command has; all if none are named.
    """
    chosen = [field for field in dataclasses.fields(TableOptions) if not names or field.name in names]
    annotations = inspect.get_annotations(TableOptions, eval_str=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**options: Any) -> None:
            table = TableOptions(**{field.name: options.pop(field.name) for field in chosen})
            if table.delimiter == r"\t":
                table = dataclasses.replace(table, delimiter="\t")  # a tab is hard to type in a shell
            command(**options, table=table)

        own = inspect.signature(command, eval_str=True).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters: list[inspect.Parameter] = []
        for parameter in own:
            if parameter.name == "table":
                parameters += [
                    inspect.Parameter(f.name, keyword, default=f.default, annotation=annotations[f.name])
                    for f in chosen
                ]
            else:
                parameters.append(parameter.replace(kind=keyword))
        # typer reads both
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate
