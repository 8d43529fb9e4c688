"""The task files that a server may load: found by name, read once per version, reported when broken."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visadapt.data.inputs import Inputs, TextInputs
from visadapt.errors import VisadaptError, nearest
from visadapt.methods import METHODS
from visadapt.opening.predicting import PROBLEMS, problem_noted
from visadapt.printable import printable
from visadapt.reading import check_file
from visadapt.runtime.registry import check_task_name
from visadapt.serving.refusal import ServingError
from visadapt.task_file import KIND, read
from visadapt.tensor_file import digest_of

SUFFIX = ".visadapt"

Stamp = tuple[int, int, int, int, int]
"""Device, inode, times of the last change of a file's content and of its inode in ns, and size: another file or
another content has another stamp, even if it was copied with its times."""


@dataclass(frozen=True)
class Entry:
    """One version of a task.

    Attributes:
        name: of the task, which is the file's name without its suffix.
        digest: SHA-256 of the description and the tensors, in hex.
        labels: names of the classes; None if they are not known.
        classes: number of classes; None for the backbone's own head.
        method: methods with their options.
        norms: policy of the norms.
        values: number of values that the task owns.
        bytes: size of the file.
        inputs: how its inputs are prepared.
        path: of the file; None for a task of a model in memory.
        stamp: of the file when it was read.
        problem: what its outputs are, one of `visadapt.opening.predicting.PROBLEMS`.
    """

    name: str
    digest: str
    labels: tuple[str, ...] | None
    classes: int | None
    method: str
    norms: str
    values: int
    bytes: int
    inputs: Inputs = field(repr=False)
    path: Path | None = None
    stamp: Stamp | None = None
    problem: str = PROBLEMS[0]

    @property
    def kind(self) -> str:
        """What an input is: ``image``, ``text`` or ``pair of texts``."""
        if isinstance(self.inputs, TextInputs):
            return "pair of texts" if self.inputs.pairs else "text"
        return "image"

    def json(self) -> dict[str, Any]:
        """Describe the task as JSON values."""
        return {
            "name": self.name,
            "labels": self.labels,
            "classes": self.classes,
            "problem_type": self.problem,
            "input": self.kind,
            "method": self.method,
            "norms": self.norms,
            "values": self.values,
            "bytes": self.bytes,
            "digest": self.digest,
        }


class Catalogue:
    """Task files by name, in folders and as single files; safe to use from several threads.

    A file is looked at (``stat``) whenever its task is asked for, and read again only if it was replaced. So a task
    that was added, replaced or removed is served, replaced or gone from the next request on.

    Args:
        places: folders of ``*.visadapt`` files, and single files.
        inputs: makes a task's inputs from its name and the notes of its file.

    Raises:
        VisadaptError: a place does not exist, or two files have the same name.
    """

    def __init__(self, places: Sequence[str | Path], inputs: Callable[[str, dict[str, Any]], Inputs]) -> None:
        paths = [Path(place) for place in places]
        if not paths:
            raise VisadaptError("files must be at least one task file, or a folder of them, got none")
        self._folders: list[Path] = []
        self._files: dict[str, Path] = {}
        for path in paths:
            if os.path.isdir(path):
                self._folders.append(path)
            elif not os.path.isfile(path):
                check_file(path, "files", "task files or folders of them")
                siblings = path.parent.iterdir() if os.path.isdir(path.parent) else ()
                raise VisadaptError(f"no file or folder {path}{nearest(path.name, (p.name for p in siblings))}")
            elif path.stem in self._files:
                raise VisadaptError(f"{path} and {self._files[path.stem]} have the same name: rename one of them")
            else:
                self._files[path.stem] = path
        self._inputs = inputs
        self._known: dict[Path, tuple[Stamp, Entry | ServingError]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all task files, sorted."""
        return sorted({*self._files, *(name for folder in self._folders for name in _stems(folder))})

    def paths(self) -> list[Path]:
        """The task files, sorted by name."""
        places = [path for name in self.names() for path in self._places(name)]
        return [path for path in places if path.is_file()]

    def entry(self, name: str) -> Entry:
        """The present version of a task.

        Raises:
            ServingError: there is no such task (``unknown_task``), or its file cannot be used (``broken_task``).
        """
        state = self.state(name)
        if isinstance(state, ServingError):
            # a new one each time: an error that is raised keeps the frames of the request in memory
            raise ServingError(state.name, str(state), state.remedy)
        return state

    def entries(self) -> Iterator[tuple[str, Entry | ServingError]]:
        """All tasks by name, with the error of those that cannot be used."""
        names = self.names()
        there = {path for name in names for path in self._places(name)}
        with self._lock:
            # what is known of files that are gone
            self._known = {path: known for path, known in self._known.items() if path in there}
        for name in names:
            state = self.state(name)
            if isinstance(state, Entry) or state.name != "unknown_task":  # removed a moment ago
                yield name, state

    def state(self, name: str) -> Entry | ServingError:
        """The present version of a task, or the reason why there is none."""
        try:
            path = self._path(name)
        except ServingError as error:
            return error
        try:
            for _ in range(100):
                # a file that is replaced while it is read is read again
                stamp = _stamp(path)
                with self._lock:
                    known = self._known.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                state, lasting = self._read(name, path, stamp)
                if stamp == _stamp(path):
                    if lasting:
                        with self._lock:
                            self._known[path] = stamp, state
                    return state
        except ServingError as error:
            return error
        except OSError as error:
            with self._lock:
                self._known.pop(path, None)
            if not os.path.lexists(path):
                return self.unknown(name)
            reason = "it links to no file" if not path.exists() else str(error.strerror or error)
            return ServingError("broken_task", f"cannot read {path.name}: {reason}", "replace the file")
        return ServingError("broken_task", f"{path.name} changes while it is read", "replace the file by renaming")

    def unknown(self, name: str) -> ServingError:
        """The error for a name that no file has."""
        return ServingError("unknown_task", f"no task {name!r:.200}{nearest(name, self.names())}", "see GET /v1/tasks")

    def _path(self, name: str) -> Path:
        """The file of a task; a name has letters, digits, ``_`` and ``-`` only, so it cannot leave the folder."""
        try:
            check_task_name(name)
        except VisadaptError as error:
            if name in self.names():
                raise ServingError("broken_task", str(error), "rename the file") from error
            raise self.unknown(name) from error
        found = [path for path in self._places(name) if os.path.lexists(path)]
        if not found:
            raise self.unknown(name)
        if len(found) > 1:
            places = f"{len(found)} of the places that are served"
            raise ServingError("broken_task", f"there is a file {found[0].name} in {places}", "remove all but one")
        return found[0]

    def _places(self, name: str) -> list[Path]:
        file = self._files.get(name)
        return [*([] if file is None else [file]), *(folder / f"{name}{SUFFIX}" for folder in self._folders)]

    def _read(self, name: str, path: Path, stamp: Stamp) -> tuple[Entry | ServingError, bool]:
        """Read a file; return what it holds, and whether that is so until the file changes."""
        try:
            content = read(path)
            description = content.description
            entry = Entry(
                name,
                content.digest or digest_of(KIND, json.dumps(description), content.tensors),
                None if description["labels"] is None else tuple(description["labels"]),
                description["num_classes"],
                " + ".join(_method(entry) for entry in description["placements"]) or "–",
                description["norms"],
                sum(tensor.numel() for tensor in content.tensors.values()),
                stamp[-1],
                self._inputs(name, description["notes"]),
                path,
                stamp,
                problem_noted(name, description["notes"]),
            )
            return entry, True
        except VisadaptError as error:
            if not path.is_file():
                raise FileNotFoundError(path) from error
            # a process that has too many files open, or no memory, says nothing about the file
            lasting = not isinstance(error.__cause__, OSError | MemoryError)
            return ServingError("broken_task", without_folder(error, path), "replace the file"), lasting


def _stems(folder: Path) -> list[str]:
    try:
        return [path.stem for path in folder.iterdir() if path.suffix == SUFFIX and not path.name.startswith(".")]
    except OSError:  # the folder was removed
        return []


def without_folder(error: Exception, path: Path) -> str:
    """The message of an error about a file, without the folder, which is not for clients."""
    return str(error).replace(str(path), path.name).replace(printable(path), path.name)


def _method(entry: dict[str, Any]) -> str:
    name, options = entry["method"], entry["options"]
    if name not in METHODS:
        raise VisadaptError(f"no method {name!r}{nearest(name, METHODS)}")
    return str(METHODS[name].of(options))


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        # of a pipe, reading would wait for a writer
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device, pipe or socket"
        raise ServingError("broken_task", f"{path.name} must be a file, got a {kind}", "replace it by a file")
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def model_digest(fingerprint: dict[str, list[str]]) -> str:
    """Shorten a backbone's fingerprint to 16 hex digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
