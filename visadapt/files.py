"""Atomic writing of files."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from visadapt.errors import VisadaptError
from visadapt.reading import check_file

_ABANDONED = 3600.0
"""Age in seconds at which a partial file that is not being written was left by a process that died."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Open a temporary file that replaces ``target`` when the block ends, and is deleted if it ends in an error.

    The new file has the permissions of the one that it replaces. Partial files of the same target that processes left
    behind when they died are deleted.

    Args:
        target: the file to create or replace.

    Yields:
        The path of an empty file in the same folder.

    Raises:
        VisadaptError: the folder cannot be written to, the disk is full, or the target is not a file (a device, say);
            it is as it was.
    """
    check_file(target, f"cannot write {target}: it", "a file")
    try:
        with holding(target.parent) as folder:
            partial = _partial(target)
            # with the permissions of an ordinary new file
            os.close(os.open(place_in(partial, folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder))
            try:
                mode = partial.stat().st_mode
                yield partial
                with suppress(FileNotFoundError):
                    mode = target.stat().st_mode
                # libraries replace the file by one with permissions of their own
                partial.chmod(stat.S_IMODE(mode))
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(partial, target)
                _sweep(target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(place_in(partial, folder), dir_fd=folder)
    except OSError as error:
        raise VisadaptError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Create a folder beside a target, for a library that writes under names of its own, and delete it afterwards.

    If the process dies, it is swept as the partial files of the target are.

    Args:
        target: the file that is created or replaced.

    Yields:
        The path of an empty folder on the disk of the target.

    Raises:
        OSError: it cannot be created.
    """
    with holding(target.parent) as outer:
        path = _partial(target)
        os.mkdir(place_in(path, outer), dir_fd=outer)
        try:
            with holding(path) as folder:
                try:
                    yield path
                finally:
                    for name in os.listdir(path if folder is None else folder):
                        os.unlink(place_in(path / name, folder), dir_fd=folder)
        finally:
            with suppress(OSError):
                os.rmdir(place_in(path, outer), dir_fd=outer)


@contextmanager
def holding(folder: Path) -> Iterator[int | None]:
    """Hold a folder open: what is in it is found by the descriptor even after the folder was renamed.

    Args:
        folder: the folder.

    Yields:
        A ``dir_fd`` for the functions of `os`; None where the system has no such thing.

    Raises:
        OSError: the folder does not exist.
    """
    if os.open not in os.supports_dir_fd:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and the folders that it is in, if there is none.

    Raises:
        VisadaptError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VisadaptError(f"cannot create the folder {folder}: {error.strerror or error}") from error


def _partial(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(8)}.partial"


def place_in(path: Path, folder: int | None) -> str:
    """Return the name to give, with ``dir_fd=folder``, to the functions of `os`; see `holding`."""
    return str(path) if folder is None else path.name


def _sweep(target: Path) -> None:
    """Delete partial files and folders of a target that have not been written to for long."""
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.partial")
    with suppress(OSError):
        for entry in os.scandir(target.parent):
            if name.fullmatch(entry.name) and time.time() - _last_written(entry) > _ABANDONED:
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def _last_written(entry: os.DirEntry[str]) -> float:
    inside = os.scandir(entry.path) if entry.is_dir(follow_symlinks=False) else ()
    times: list[float] = [each.stat(follow_symlinks=False).st_mtime for each in (entry, *inside)]
    return max(times)
