"""Atomic writing of files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file

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


def write_tensors(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Args:
        target: the file to create or replace.
        tensors: by name; they are moved to the CPU.
        metadata: strings for the header.

    Raises:
        VisadaptError: the folder cannot be written to.
    """
    # by address, as safetensors.torch does, but without numpy
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."), shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes
        )
        for name, t in data.items()
    }
    with replacing(target) as partial:
        try:
            serialize_file(specs, partial, metadata)
        except SafetensorError as error:
            raise VisadaptError(f"cannot write {target}: {error}") from error
