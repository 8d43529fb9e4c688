"""Where task files are: on this machine, or in a repository of the Hugging Face hub.

A repository is named by the caller, so it may be downloaded. Only its task files are: nothing else of it is read, and
what they ask for is decided as for any other file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visadapt.errors import VisadaptError
from visadapt.optional import require

SUFFIX = ".visadapt"
PREFIX = "hub:"

_NAME = r"[A-Za-z0-9_][\w.-]*"
_REPOSITORY = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})(?:/(?P<file>{_NAME}\{SUFFIX}))?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)


@dataclass(frozen=True)
class Located:
    """A task file on this machine.

    Attributes:
        path: of the file.
        origin: what it was named by; in a repository, with the commit: ``hub:user/repo/flowers.visadapt@<commit>``.
        commit: the repository's commit; None for a file of this machine.
    """

    path: Path
    origin: str
    commit: str | None = None


def located(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Located]:
    """Find task files, downloading those of repositories that are not in the cache.

    Args:
        source: a path, ``"hub:user/repo"``, ``"hub:user/repo/flowers.visadapt"`` (either with ``@revision``), or a
            sequence of these. ``"user/repo"`` is a repository if it is not a path here and does not end in
            ``.visadapt``.

    Raises:
        VisadaptError: a repository cannot be downloaded, or has no such file; there is nothing in ``source``.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise VisadaptError("source must be a task file or several, got none")
    if "" in sources:
        raise VisadaptError("a task file must have a name, got ''")
    found: list[Located] = []
    for each in sources:
        match = _repository(each)
        found += [Located(Path(each), os.fspath(each))] if match is None else _downloaded(str(each), match)
    return found


def _repository(source: Any) -> re.Match[str] | None:
    if not isinstance(source, str):
        return None
    match = _REPOSITORY.fullmatch(source.removeprefix(PREFIX))
    if source.startswith(PREFIX):
        if match is None:
            raise VisadaptError(
                f"a repository must be hub:user/repo, with /name{SUFFIX} and @revision as needed, got {source!r}"
            )
        return match
    return None if match is None or source.endswith(SUFFIX) or os.path.exists(source) else match


def _downloaded(source: str, match: re.Match[str]) -> list[Located]:
    name, file, revision = match.group("repository", "file", "revision")
    hub = require("huggingface_hub", f"the repository {name}", "visadapt[hub]")
    try:
        # no subfolders: a task file stands at the top
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=[file or f"*{SUFFIX}"],
                                            ignore_patterns=["*/*"]))  # fmt: skip
    except Exception as error:  # errors of the cache, of HTTP and of the name have no common class
        where = "" if source.startswith(PREFIX) else f"no file {source}, and "
        raise VisadaptError(f"{where}cannot download {name!r} from the hub: {' '.join(str(error).split())}") from error
    commit = folder.name
    files = sorted(path for path in folder.glob(file or f"*{SUFFIX}") if path.is_file())
    if not files:
        raise VisadaptError(f"the repository {name} has no {file or f'task file (*{SUFFIX})'} at revision {commit}")
    return [Located(path, f"{PREFIX}{name}/{path.name}@{commit}", commit) for path in files]
