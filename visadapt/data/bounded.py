"""Images and compressed files of any origin, opened with bounds on what they take in memory."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, BinaryIO

from visadapt.errors import VisadaptError
from visadapt.limits import check_limit, limit, variable
from visadapt.optional import require
from visadapt.reading import SMALL, opened


def open_image(file: Path | str | IO[bytes], name: str) -> Any:
    """Read an image file with Pillow.

    Args:
        file: path of the image, or its content.
        name: for messages.

    Returns:
        The image, decoded, in its own mode.

    Raises:
        VisadaptError: it is not a readable image, or has more pixels than `visadapt.limits.LIMITS` allows.
    """
    pil = require("PIL.Image", "loading images", "pillow")
    if variable("IMAGE_PIXELS") in os.environ and pil.MAX_IMAGE_PIXELS is not None:
        # Pillow has a bound of its own
        pil.MAX_IMAGE_PIXELS = max(pil.MAX_IMAGE_PIXELS, limit("IMAGE_PIXELS"))
    try:
        # Pillow maps a file that it opens itself, which would be a SIGBUS if the file is cut short meanwhile
        with opened(file) if isinstance(file, str | Path) else nullcontext(file) as content, pil.open(content) as image:
            if image.format == "EPS":
                raise VisadaptError(f"{name} must be an image, got a program in PostScript, which another would run")
            check_limit(image.width * image.height, "IMAGE_PIXELS", name)
            image.load()
    except VisadaptError:
        raise
    except pil.UnidentifiedImageError as error:
        raise VisadaptError(f"{name} is not a readable image: Pillow does not know its format") from error
    # Pillow raises many types of error for damaged files, by format: struct.error, KeyError, IndexError, …
    except Exception as error:
        raise VisadaptError(f"{name} is not a readable image: {error or type(error).__name__}") from error
    return image


def is_image(file: Path, formats: Sequence[str] | None = None) -> bool:
    """Whether the content of a file, not its name, is of one of these formats; None for all that Pillow knows."""
    pil = require("PIL.Image", "loading images", "pillow")
    try:
        with opened(file) as content, pil.open(content, formats=formats):
            return True
    except Exception:
        return False


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that grows by no more than a factor."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        super().__init__(mode="rb", fileobj=file)
        self._what = what
        self._packed = max(1, os.fstat(file.fileno()).st_size)
        self._read = 0

    def _counted(self, data: bytes) -> bytes:
        self._read += len(data)
        if self._read > SMALL:
            check_limit(self._read / self._packed, "UNPACKED_RATIO", self._what)
        return data

    def read(self, size: int | None = -1) -> bytes:
        return self._counted(super().read(SMALL if size is None or size < 0 else min(size, SMALL)))

    def read1(self, size: int = -1) -> bytes:
        return self._counted(super().read1(size))


def read_gzip(file: Path) -> bytes:
    """Unpack a gzip file into memory.

    Args:
        file: path of the file.

    Raises:
        VisadaptError: it cannot be read, is damaged, or grows by more than `visadapt.limits.LIMITS` allows.
    """
    with opened(file) as packed, _BoundedGzip(packed, str(file)) as unpacked:
        return b"".join(iter(unpacked.read, b""))


def unpack_zip(file: Path, folder: Path) -> None:
    """Unpack a zip file into a folder.

    Args:
        file: path of the zip file.
        folder: an empty folder.

    Raises:
        VisadaptError: it cannot be read, or grows by more than `visadapt.limits.LIMITS` allows, by its own account of
            the sizes, beyond which nothing is unpacked.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > SMALL:
                check_limit(size / max(1, file.stat().st_size), "UNPACKED_RATIO", str(file))
            archive.extractall(folder)
    # encrypted files are a RuntimeError, unknown compression a NotImplementedError
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError, OSError) as error:
        raise VisadaptError(f"cannot unpack {file}: {error}") from error
