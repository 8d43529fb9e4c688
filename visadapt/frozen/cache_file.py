"""The file of a prefix cache: written to a temporary file, renamed, verified by a digest, and never changed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.errors import VisadaptError
from visadapt.files import holding, place_in
from visadapt.reading import SMALL, check_file, opened, read_json
from visadapt.tensor_file import raw

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 2

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class CacheFile:
    """Features in a file, as they lie in memory, and their origin as JSON in ``<file>.key``.

    The key holds shape, dtype and a SHA-256 of the features, and the identity that they were computed for. A file is
    written as ``<file>.partial``, by one writer at a time (others wait), and renamed when it is complete and on the
    disk. A process that reads the older file keeps reading it.

    Args:
        path: of the features.
        shape: of the features.
        dtype: of the features.

    Raises:
        VisadaptError: there is something else at the path, which would be lost.
    """

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.key = Path(path), Path(f"{os.fspath(path)}.key")
        self.partial = Path(f"{os.fspath(path)}.partial")
        self.shape, self.dtype = shape, dtype
        self.size = math.prod(shape) * dtype.itemsize
        for each in (self.path, self.key, self.partial):
            check_file(each, "file", "a file of features")
        if self.path.exists() and self.path.stat().st_size and not self.key.exists():
            raise VisadaptError(f"file must be a file of features or new, got {self.path} without {self.key.name}")

    def _recorded(self) -> dict[str, Any]:
        """The content of the key; empty if the key is missing or of another format."""
        try:
            found = read_json(self.key)
        except (ValueError, RecursionError):  # a VisadaptError is a ValueError
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("identity"), dict) else {}

    def might_be(self, identity: dict[str, Any]) -> bool:
        """Whether the key agrees with ``identity``, which may be only a part of the features' identity."""
        found = self._recorded()
        own = {**found.get("identity", {}), **identity}
        return found == self._description(own, found.get("digest"))

    def read(self, identity: dict[str, Any]) -> Tensor | None:
        """The features, mapped read-only; None if the file has another origin, or was changed.

        Args:
            identity: the required origin, as JSON values.
        """
        found = self._recorded()
        if found != self._description(identity, found.get("digest")):
            return None
        with suppress(OSError, VisadaptError), opened(self.path) as file:
            if os.fstat(file.fileno()).st_size == self.size and _digest(file) == found["digest"]:
                return self._map(file)
        return None

    def _description(self, identity: dict[str, Any], digest: Any) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.size,
            "digest": digest,
            "identity": identity,
        }

    def _map(self, file: Any) -> Tensor:
        # a private map of a file opened for reading: what is written to the tensor never reaches the file
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.shape)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Return the only writer of this file, waiting while another writes.

        Raises:
            VisadaptError: the folder cannot be written to, or the disk is full. The file is as it was then.
        """
        try:
            with holding(self.partial.parent) as folder:
                descriptor = _locked(self.partial)
                name = place_in(self.partial, folder)
                try:
                    yield Writer(self, descriptor)
                finally:
                    with suppress(OSError):
                        if os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=folder)):
                            os.unlink(name, dir_fd=folder)
                    os.close(descriptor)
        except OSError as error:
            raise VisadaptError(
                f"cannot keep {self.size / 1e6:.4g} MB of features in {self.path}: {error.strerror or error}"
            ) from error


class Writer:
    """Writes a cache file whose lock is held."""

    def __init__(self, file: CacheFile, descriptor: int) -> None:
        self.file, self.descriptor = file, descriptor

    def write(self, parts: Iterable[Tensor], identity: Callable[[], dict[str, Any]]) -> Tensor:
        """Write the features and the key, and rename both.

        Args:
            parts: consecutive pieces of the features.
            identity: returns their origin, once all of them are written.

        Returns:
            The features, mapped read-only.

        Raises:
            OSError: the disk is full, for example.
        """
        file, descriptor, digest = self.file, self.descriptor, hashlib.sha256()
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        _allocate(descriptor, file.size)
        for part in parts:
            data = raw(part)
            digest.update(data)
            while data:
                data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
        if os.lseek(descriptor, 0, os.SEEK_CUR) != file.size:
            raise AssertionError(f"the pieces of {file.path} are not of the announced size")
        key = file._description(identity(), digest.hexdigest())
        beside = Path(f"{file.key}.partial")
        beside.unlink(missing_ok=True)
        with beside.open("x", encoding="utf-8") as written:
            json.dump(key, written)
            written.flush()
            os.fsync(written.fileno())
        # the key first: a file without one is somebody else's
        os.replace(beside, file.key)
        os.replace(file.partial, file.path)
        with open(descriptor, "rb", closefd=False) as whole:
            return file._map(whole)


def _locked(path: Path) -> int:
    """Open a file that no other process or thread holds, waiting for those that do."""
    while True:
        # a link would let someone else choose the file that is cut off
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # the process that held it may have renamed or removed it
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the disk space, where the system can, so that a full disk is found before anything is computed."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(SMALL):
        digest.update(chunk)
    return digest.hexdigest()
