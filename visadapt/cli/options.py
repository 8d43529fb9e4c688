"""The options that several commands share, and what their texts mean."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from visadapt.errors import VisadaptError, nearest

Backbone = Annotated[str, typer.Argument(help="Such as timm/resnet50, torchvision/vgg16, hf/NAME, bundled/resnet50.")]

TaskFile = Annotated[Path, typer.Argument(help="A task's file, ….visadapt.")]

Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.")]

Force = Annotated[bool, typer.Option("--force", help="Replaces files that are there.")]

Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")]

Precision = Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.")]

BatchSize = Annotated[int, typer.Option(min=1, help="Samples a step.")]

Build = Annotated[
    list[str] | None,
    typer.Option("--build", metavar="KEY=VALUE", help="Told to the backbone's loader, such as pretrained=false."),
]

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="PLACE", help="A kind of site, a stage, a depth such as 3, a glob; may be repeated."
    ),
]

Method = Annotated[str, typer.Option(help="What is put in: Bottleneck, Parallel, Series, LoRA, ….")]

Width = Annotated[str | None, typer.Option("--m", help="Width of the bottleneck, such as 32, or a fraction, as 0.25.")]

MethodOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the method; may be repeated.")
]

Norms = Annotated[str, typer.Option(help="What the task owns of the norms: frozen, affine or full.")]

Text = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="COLUMN", help="Column of the texts, by name or number from 0; twice for pairs."),
]

Label = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", help="Column of the labels, by name or number.")
]

Header = Annotated[bool, typer.Option("--header/--no-header", help="Whether the first line names the columns.")]

Root = Annotated[Path | None, typer.Option(help="Folder of the named sets that do not come with the library.")]

OtherBackbone = Annotated[
    str | None,
    typer.Option("--backbone", help="The backbone's name, where the file does not remember it or must not choose it."),
]
Online = Annotated[
    bool, typer.Option("--online", help="Downloads a backbone that only the file names, if it is not on this machine.")
]


def pairs(given: Iterable[str] | None, what: str) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a dict; values are JSON where they can be, such as 3, true or null.

    Raises:
        VisadaptError: one has no ``=``.
    """
    found = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise VisadaptError(f"{what} takes KEY=VALUE, got {text!r}")
        found[key] = _value(value)
    return found


def number(text: str) -> int | float | str:
    """An int or a float where a text is one, else the text."""
    value = _value(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def columns(text: list[str] | None, label: str | None, header: bool, root: Path | None) -> dict[str, Any]:
    """The options of a data loader that were given, as it takes them."""
    given: dict[str, Any] = {} if header else {"header": False}
    if text:
        given["text"] = [number(column) for column in text]
    if label is not None:
        given["label"] = number(label)
    if root is not None:
        given["root"] = root
    return given


def unwritten(path: Path, force: bool) -> Path:
    """A path that can be written to, found out before any work is done.

    Raises:
        VisadaptError: it exists and ``force`` is off; its folder does not exist.
    """
    if path.is_dir():
        raise VisadaptError(f"{path} is a folder; --out names a file")
    if path.exists() and not force:
        raise VisadaptError(f"{path} exists already: --force replaces it")
    if not path.parent.is_dir():
        siblings = path.parent.parent.iterdir() if path.parent.parent.is_dir() else ()
        raise VisadaptError(f"no folder {path.parent}{nearest(path.parent.name, (p.name for p in siblings))}")
    return path
