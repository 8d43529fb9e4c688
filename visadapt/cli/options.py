"""Options shared by several commands, and how their values are parsed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from visadapt.checks import check_choice, check_non_negative
from visadapt.errors import VisadaptError, nearest
from visadapt.methods import METHODS
from visadapt.methods import Method as AnyMethod
from visadapt.methods.policy import NORM_POLICIES, NormPolicy

Backbone = Annotated[
    str, typer.Argument(help="Backbone: timm/resnet50, torchvision/vgg16, hf/NAME or bundled/resnet50.")
]

TaskFile = Annotated[
    str, typer.Argument(help="Task file (*.visadapt), or hub:USER/REPO[/FILE][@REVISION] of the Hugging Face hub.")
]

Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]

Device = Annotated[str | None, typer.Option(help="Device to run on, such as cpu or cuda:0.")]

Precision = Annotated[str | None, typer.Option(help="Precision: fp32, or bf16 (autocast).")]

BatchSize = Annotated[int, typer.Option(min=1, help="Samples per step.")]

Build = Annotated[
    list[str] | None,
    typer.Option(
        "--build",
        metavar="KEY=VALUE",
        help="Option for the backbone's loader, such as pretrained=false; repeatable.",
    ),
]

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="PLACE", help="Where adapters go: a kind of site, a stage, a depth or a glob; repeatable."
    ),
]

Method = Annotated[str, typer.Option(help="Adapter method: Bottleneck, Parallel, Series, LoRA, …")]

Width = Annotated[
    str | None,
    typer.Option("--m", help="Bottleneck width: an integer, or a fraction of each site's channels."),
]

MethodOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method; repeatable.")
]

Norms = Annotated[
    str,
    typer.Option(
        help="What the task trains of the norms: frozen, affine, full (with statistics), or auto: affine, and frozen "
        "for a Ladder."
    ),
]

Text = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="COLUMN", help="Text column, by name or by number from 0; give it twice for pairs."),
]

Label = Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Label column, by name or number.")]

Header = Annotated[bool, typer.Option("--header/--no-header", help="Whether the first line holds the column names.")]

Root = Annotated[
    Path | None, typer.Option(help="Folder of data sets that are not bundled, or from which a table names its images.")
]

ImageColumn = Annotated[
    str | None,
    typer.Option("--image", metavar="COLUMN", help="Column of image files in a table, by name or by number from 0."),
]

Delimiter = Annotated[
    str | None, typer.Option(help="Column separator of tables; default: a comma in .csv, a tab in other files.")
]

Encoding = Annotated[
    str | None, typer.Option(help="Encoding of tables and texts, such as latin-1; default: UTF-8, or UTF-16 if marked.")
]

Regression = Annotated[bool, typer.Option("--regression", help="The labels are real values.")]

MultiLabel = Annotated[
    str | None,
    typer.Option(
        "--multi-label", metavar="SEPARATOR", help="A sample has any number of labels, separated by this in its cell."
    ),
]

Memory = Annotated[
    float, typer.Option(min=0, help="Gigabytes of images to keep in memory; a larger set is read anew in each epoch.")
]

Damaged = Annotated[
    float, typer.Option("--damaged", min=0, max=1, help="Fraction of the images that may be damaged and are skipped.")
]

OtherBackbone = Annotated[
    str | None,
    typer.Option("--backbone", help="Name of the backbone, if the file does not record it or must not choose it."),
]
Online = Annotated[bool, typer.Option("--online", help="Allow downloading a backbone that only the file names.")]


def pairs(given: Iterable[str] | None, what: str) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` strings into a dict; values are parsed as JSON where possible, such as 3, true or null.

    Raises:
        VisadaptError: a string has no ``=``.
    """
    options = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise VisadaptError(f"{what} must be KEY=VALUE, got {text!r}")
        options[key] = _value(value)
    return options


def memory_bytes(gigabytes: float) -> int:
    """Bytes of ``--memory``.

    Raises:
        VisadaptError: it is not a finite number.
    """
    check_non_negative(gigabytes, "--memory")
    return int(gigabytes * 1e9)


def number(text: str) -> int | float | str:
    """Parse an int or a float; return any other text unchanged."""
    value = _value(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def data_options(noted: Any = None, **given: Any) -> dict[str, Any]:
    """Collect the data loader's options that were given on the command line.

    Args:
        noted: options of the table that the task was trained on, as its file notes them; those given replace them.
        given: options by name; None, False and a header stand for the default.

    Raises:
        VisadaptError: the notes are not options of a table.
    """
    options = table_notes(noted)
    for name, value in given.items():
        if value not in (None, [], False) and not (name == "header" and value):
            options[name] = value
        elif name == "header" and value is False:
            options["header"] = False
    return options


TABLE_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "text": list,
    "label": str,
    "image": str,
    "header": bool,
    "delimiter": str,
    "encoding": str,
    "multi_label": str,
    "regression": bool,
}
"""What a task file may note of the table that it was trained on."""


def table_notes(noted: Any) -> dict[str, Any]:
    """Check the noted options of a table; an empty dict if there are none.

    Raises:
        VisadaptError: they are of another form.
    """
    if noted is None:
        return {}
    good = isinstance(noted, dict) and all(
        name in TABLE_OPTIONS and isinstance(value, TABLE_OPTIONS[name]) for name, value in noted.items()
    )
    if not good or not all(isinstance(column, str) for column in noted.get("text", [])):
        raise VisadaptError(f"the note 'table' of the task must hold options of a table, got {noted!r:.100}")
    return dict(noted)


def norm_policy(name: str) -> NormPolicy:
    """The policy that ``--norms`` names.

    Raises:
        VisadaptError: there is none of that name.
    """
    check_choice(name, ("auto", *NORM_POLICIES), "norm policy")
    return cast("NormPolicy", name)


def check_writable(path: Path, force: bool, given: str = "--out") -> Path:
    """Check that a path can be written to, before any work is done.

    Args:
        path: the path.
        force: whether it may exist.
        given: the option that names it.

    Raises:
        VisadaptError: the path exists and ``force`` is off, it is a folder, or its parent folder does not exist.
    """
    if path.is_dir():
        raise VisadaptError(f"{given} must be a file, got the folder {path}")
    if path.exists() and not force:
        raise VisadaptError(f"{path} already exists: use --force to overwrite it")
    if not path.parent.is_dir():
        siblings = path.parent.parent.iterdir() if path.parent.parent.is_dir() else ()
        hint = nearest(path.parent.name, (p.name for p in siblings))
        raise VisadaptError(f"no folder {path.parent} for {given}{hint}")
    return path


def parse_method(name: str, m: str | None, options: list[str] | None) -> AnyMethod:
    """Build a method from ``--method``, ``--m`` and ``--option KEY=VALUE``.

    Raises:
        VisadaptError: the method or one of its options does not exist, or a value is not valid.
    """
    check_choice(name, METHODS, "method")
    return METHODS[name].of({**({} if m is None else {"m": number(m)}), **pairs(options, "--option")})
