"""Find bundled files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from visadapt.arguments import takes
from visadapt.errors import VisadaptError, nearest

# next to this module in an installed wheel, at the top in a checkout
_FOLDERS = (Path(__file__).parent / "bundled", Path(__file__).resolve().parents[2] / "data")


def folder() -> Path:
    """Return the folder of the bundled files.

    Raises:
        VisadaptError: the library was installed without them.
    """
    for place in _FOLDERS:
        if (place / "SHA256SUMS").is_file():
            return place
    raise VisadaptError("the bundled data files are not installed: install visadapt from a wheel or a full checkout")


def names() -> tuple[str, ...]:
    """Return the names of all bundled files, sorted."""
    lines = (folder() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return tuple(sorted(line.split("  ", 1)[1] for line in lines))


@takes()
def path(name: str) -> Path:
    """Return the path of a bundled file.

    Args:
        name: the file's name, such as ``"resnet50_imagenet_int8.safetensors"``.

    Raises:
        VisadaptError: no bundled file has this name.

    Examples:
        >>> from visadapt.data import path
        >>> path("mnist.webp").is_file()
        True
    """
    if name not in names():
        raise VisadaptError(f"no bundled file {name!r}{nearest(name, names())}")
    return folder() / name


def warn_of_namesake(name: str) -> None:
    """Warn if a data set has the name of a local file or folder, which is then not the one that is loaded."""
    if os.path.exists(name):
        warnings.warn(f"loading the data set {name!r}, not the local file or folder './{name}'", stacklevel=3)
