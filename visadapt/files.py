"""Atomic writing of files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visadapt.errors import VisadaptError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Open a temporary file that replaces ``target`` when the block ends, and is deleted if it ends in an error.

    Args:
        target: the file to create or replace.

    Yields:
        The path of an empty file in the same folder.

    Raises:
        VisadaptError: the folder cannot be written to.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
    except OSError as error:
        raise VisadaptError(f"cannot write {target}: {error.strerror or error}") from error
    partial = Path(name)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise VisadaptError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
