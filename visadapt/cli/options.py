"""Options shared by several commands, and how their values are parsed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from visadapt.arguments import check_argument
from visadapt.checks import check_choice, check_non_negative
from visadapt.errors import VisadaptError, nearest
from visadapt.methods import METHODS
from visadapt.methods import Method as AnyMethod
from visadapt.methods.policy import NORM_POLICIES, NormPolicy
from visadapt.reading import check_file

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

Root = Annotated[
    Path | None, typer.Option(help="Folder of data sets that are not bundled, or from which a table names its images.")
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

    Python's True, False and None are understood as well: as a text, ``False`` would be true.

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


def check_loading(seed: int, memory: float) -> None:
    """Check ``--seed`` and ``--memory`` before any work is done.

    Raises:
        VisadaptError: one of them is not a finite number that a seed or a size can be.
    """
    check_argument(seed, int, "--seed")
    check_non_negative(memory, "--memory")


def number(text: str) -> int | float | str:
    """Parse an int or a float; return any other text unchanged."""
    value = _value(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


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
    if not (os.path.islink(path) and not os.path.exists(path)):  # a link to nothing is replaced
        check_file(path, f"{given}", "a file")
    if os.path.exists(path) and not force:
        raise VisadaptError(f"{path} already exists: use --force to overwrite it")
    if not os.path.isdir(path.parent):
        siblings = path.parent.parent.iterdir() if os.path.isdir(path.parent.parent) else ()
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
