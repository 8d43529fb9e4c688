"""Finds the files that come with the library."""

from __future__ import annotations

import warnings
from pathlib import Path

from visadapt.errors import VisadaptError, nearest

# an installed wheel carries the files beside this module, a checkout keeps them at its top
_FOLDERS = (Path(__file__).parent / "bundled", Path(__file__).resolve().parents[2] / "data")


def folder() -> Path:
    """The folder of the bundled files.

    Raises:
        VisadaptError: the library was installed without them.
    """
    for place in _FOLDERS:
        if (place / "SHA256SUMS").is_file():
            return place
    raise VisadaptError("the bundled data files are not installed: install visadapt from a wheel or a full checkout")


def names() -> tuple[str, ...]:
    """The names of all bundled files, sorted."""
    lines = (folder() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return tuple(sorted(line.split("  ", 1)[1] for line in lines))


def path(name: str) -> Path:
    """The path of one bundled file.

    Args:
        name: the file's name, such as ``"resnet50_imagenet_int8.safetensors"``.

    Raises:
        VisadaptError: no bundled file has this name.
    """
    if name not in names():
        raise VisadaptError(f"no bundled file {name!r}{nearest(name, names())}")
    return folder() / name


def warn_of_namesake(name: str) -> None:
    """Warns where a set's name is that of a folder or file here as well: the set is what is loaded."""
    if Path(name).exists():
        warnings.warn(f"the set {name!r} is loaded, not what is called so here: that is './{name}'", stacklevel=3)
