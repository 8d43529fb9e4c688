"""Reading of files: regular ones, whole, from one opening, and with no more memory than they take on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from visadapt.bounded_json import parse_json
from visadapt.errors import VisadaptError
from visadapt.limits import check_limit

SMALL = 1 << 24
"""Bytes that any file may take, however few of them are on the disk."""

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def other_kind(path: str | os.PathLike[str]) -> str | None:
    """What a path is if it is not a file: ``folder``, ``pipe``, ``socket``, ``device`` or ``link to nothing``.

    Args:
        path: any path.

    Returns:
        None for a regular file, and for a path at which there is nothing.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # a name that no file can have
        return "link to nothing" if os.path.islink(path) else None


def check_file(path: str | os.PathLike[str], name: str, what: str) -> None:
    """Refuse a path of something that is not a file; one at which there is nothing passes.

    Args:
        path: any path.
        name: of the argument, for the message.
        what: what it must be: ``"a task file"``.

    Raises:
        VisadaptError: it is a folder, a pipe, a socket, a device, or a link to nothing.
    """
    kind = other_kind(path)
    if kind is not None:
        raise VisadaptError(f"{name} must be {what}, got the {kind} {path}")


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Of a pipe, opening would wait for a writer, and of a device, reading might never end, so both are refused. So is a
    file of holes that takes much more memory than it takes on the disk, as a compressed file would be.

    Args:
        path: of the file.

    Returns:
        The file, in binary mode, to be closed by the caller.

    Raises:
        VisadaptError: it cannot be opened, is not a regular file, or has too many holes; the cause is the error of the
            system, if there is one.
    """
    with _readable(path):
        # before it is opened: a device may act on that; and after, in case that it was replaced
        _check_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(descriptor, "rb")
        try:
            found = os.fstat(descriptor)
            _check_regular(path, found)
            if found.st_size > SMALL:
                check_limit(found.st_size / max(1, _stored(descriptor, found.st_size)), "UNPACKED_RATIO", str(path))
        except BaseException:
            file.close()
            raise
        return file


def check_readable(place: str | os.PathLike[str]) -> None:
    """Refuse what a library that reads files by itself should not be given.

    Args:
        place: a file, or a folder of files; links to other folders are not followed. A name at which there is nothing,
            such as one of a hub, passes.

    Raises:
        VisadaptError: one of its files cannot be opened, is a pipe, a socket or a device, or has too many holes.
    """
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names)
    for path in inside if os.path.isdir(place) else [place]:
        # a link to nothing is as good as no file
        if os.path.exists(path):
            opened(path).close()


def read_whole(path: str | os.PathLike[str], bound: str | None = None) -> bytes:
    """Read a file.

    Args:
        path: of the file.
        bound: name of a bound on its size, one of `visadapt.limits.LIMITS`.

    Raises:
        VisadaptError: see `opened`; or it cannot be read, is larger than the bound or than the memory, or was written
            to meanwhile.
    """
    with opened(path) as file:
        return read_on(file, path, bound)


def read_on(file: BinaryIO, path: str | os.PathLike[str], bound: str | None = None) -> bytes:
    """Read an open file from its present position to the end; see `read_whole`."""
    with _readable(path):
        left = os.fstat(file.fileno()).st_size - file.tell()
        if bound is not None:
            check_limit(left, bound, str(path))
        # one byte more, to see whether it grows
        data = file.read(left + 1)
    if len(data) != left:
        raise VisadaptError(f"cannot read {path}: it was written to meanwhile")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, within the bounds of `visadapt.limits.LIMITS`.

    Raises:
        VisadaptError: see `read_whole` and `visadapt.bounded_json.parse_json`.
        ValueError: it is not JSON.
        RecursionError: it is too deep to be parsed.
    """
    return parse_json(read_whole(path, "JSON_BYTES").decode(), str(path))


def sha256_of(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with opened(path) as file, _readable(path):
        while piece := file.read(SMALL):
            digest.update(piece)
    return digest.digest()


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except VisadaptError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise VisadaptError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except MemoryError as error:
        raise VisadaptError(f"cannot read {path}: it does not fit into memory") from error


def _check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "special file")
        raise VisadaptError(f"{path} must be a file, got a {kind}")


def _stored(descriptor: int, size: int) -> int:
    """Bytes of a file that are not holes; all of them where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    stored = end = 0
    try:
        # more than half is enough to know
        while stored * 2 < size:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            stored += end - begin
    except OSError as error:
        # there is nothing behind the last hole, or else the file system does not tell
        return stored if error.errno == errno.ENXIO else size
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return stored
