"""Safetensors files with a JSON description, covered by a digest: task files, deciders, checkpoints."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load as parse
from torch import Tensor

from visadapt.bounded_json import parse_json
from visadapt.errors import VisadaptError
from visadapt.files import replacing, scratch
from visadapt.limits import check_limit
from visadapt.reading import opened, read_on

_DIGEST = "visadapt_digest"

_SEAL = re.compile(f',"{_DIGEST}":"([0-9a-f]{{64}})"}}$')
# the last entry of the description, which covers everything before it: a second entry among the metadata would be
# written in random order


@dataclass(frozen=True)
class Content:
    """What a described file holds.

    Attributes:
        description: its JSON value.
        tensors: by name, on the CPU.
        digest: SHA-256 over the description and all tensors, in hex, which was checked; None for a file of an earlier
            version, which carries none.
    """

    description: Any
    tensors: dict[str, Tensor]
    digest: str | None


def write_described(target: Path, kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their description to a file, atomically.

    Args:
        target: the file to create or replace.
        kind: key of the description among the metadata; it tells the kinds of file apart.
        description: JSON values, at least one.
        tensors: by name; they are moved to the CPU.

    Raises:
        VisadaptError: the description is not JSON, or the file cannot be written.
    """
    try:
        text = json.dumps(description, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise VisadaptError(f"the description of {target.name} must be JSON: {error}") from error
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = f'{text[:-1]},"{_DIGEST}":"{digest_of(kind, text, data)}"}}'
    write_tensors(target, data, {kind: sealed})


def read_described(path: Path, kind: str, what: str) -> Content:
    """Read a file that `write_described` wrote, and check its digest.

    The file is opened and read once, so that header and tensors are of one version even while it is being replaced. Of
    a file without such a description, only the header is read.

    Args:
        path: the file.
        kind: key of its description.
        what: the kind of file in words, for messages.

    Returns:
        Its content. The description is parsed JSON, and not checked further.

    Raises:
        VisadaptError: the file cannot be read, is not a safetensors file with such a description, or was changed after
            it was written.
    """
    try:
        with opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("its header is cut off")
            check_limit(length, "JSON_BYTES", f"the header of {path}")
            header = parse_json(file.read(length).decode(), f"the header of {path}")
            sealed: Any = (header.get("__metadata__") or {}).get(kind)
            if sealed is None:
                raise VisadaptError(f"{path} is not a {what}: its header has no description {kind!r}")
            seal = _SEAL.search(sealed)
            text = sealed if seal is None else sealed[: seal.start()] + "}"
            description = parse_json(text, f"the description of {path}")
            file.seek(0)
            tensors = parse(read_on(file, path))
    except VisadaptError:
        raise
    except OSError as error:
        raise VisadaptError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise VisadaptError(f"{path} is not a whole {what}: {error or type(error).__name__}") from error
    digest = None if seal is None else seal.group(1)
    if digest != digest_of(kind, text, tensors) if seal is not None else _DIGEST in text:
        raise VisadaptError(f"{path} was changed or damaged after it was written: its digest does not match")
    return Content(description, tensors, digest)


def digest_of(kind: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of a description and of the names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256(f"{kind}\n{text}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return a view of the bytes of a tensor's values, without numpy."""
    # in the tensor's own dtype: a backbone rounded to half precision is a different backbone
    whole = tensor.detach().cpu().contiguous()
    data: Any = (ctypes.c_ubyte * (whole.numel() * whole.element_size())).from_address(whole.data_ptr())
    data.owner = whole  # keeps the memory alive as long as the view
    return memoryview(data)


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
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
    # safetensors writes to a file of a random name, which would stay if the process died
    with replacing(target) as partial, scratch(target) as folder:
        try:
            serialize_file(specs, folder / "tensors", metadata)
            os.replace(folder / "tensors", partial)
        except SafetensorError as error:
            raise VisadaptError(f"cannot write {target}: {error}") from error
