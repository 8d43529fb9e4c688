"""Damaged and hostile copies of files: bytes changed, and contents changed and sealed again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.tensor_file import read_described, write_described

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 10**6, 10**9, 2**63, 10**40, -(10**9)),
    *(0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "x", "a.b", "../x", "\x1b[31m", "\u202e", "9" * 50),
    *([], [1], ["x"], [[]], {}, {"x": 1}, {"": []}),
)
"""What takes the place of a value in a description."""

DTYPES = (*(torch.float64, torch.float16, torch.bfloat16, torch.complex64), *(torch.int64, torch.int8, torch.bool))

PIECES = (b"0", b"9", b"9" * 30, b"[" * 200, b'"', b"\\", b"-", b"e9", b"}")

SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.flatten()[:-1],
    lambda t: t[..., :0],
    lambda t: t.flatten()[:1].reshape(()),
    lambda t: torch.cat([t.flatten()] * 3),
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A copy of a file with bytes changed, cut out, doubled or cut off; more often in a safetensors header.

    Args:
        data: content of the file.
        rng: draws the damage.
    """
    header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    while True:
        mutant = bytearray(data)
        start = rng.randrange(header if rng.random() < 0.6 else len(data))
        length = rng.choice((1, 1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0:
                mutant[start] ^= 1 << rng.randrange(8)
            case 1:
                mutant[start : start + length] = rng.randbytes(length)
            case 2:
                del mutant[start : start + length]
            case 3:
                mutant[start:start] = mutant[start : start + length]
            case 4:
                del mutant[start:]
            case 5:
                mutant[start : start + 1] = rng.choice(
                    (b"0", b"9", b"9" * 30, b"[" * 200, b'"', b"\\", b"-", b"e9", b"}")
                )
        if mutant != data:
            return bytes(mutant)


def changed(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one thing in it replaced, removed, repeated or renamed.

    Args:
        value: a list or object.
        rng: draws the change.
    """
    mutant = copy.deepcopy(value)
    places = [place for place in _containers(mutant) if len(place)]
    place = rng.choice(places)
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    match rng.randrange(6):
        case 0 | 1 | 2:
            place[key] = copy.deepcopy(rng.choice(VALUES))
        case 3:
            del place[key]
        case 4 if isinstance(place, list):
            place[key:key] = [copy.deepcopy(place[key])] * rng.choice((1, 200))
        case 4:
            place[rng.choice(("x", "", f"{key}x"))] = place.pop(key)
        case 5:
            other = rng.choice(places)
            place[key] = copy.deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
    return mutant


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def altered(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """A copy of named tensors with one of them removed, renamed, or of another shape, dtype or value.

    Args:
        tensors: by name.
        rng: draws the change.
    """
    mutant = dict(tensors)
    name = rng.choice(list(mutant))
    tensor = mutant.pop(name)
    match rng.randrange(6):
        case 1:
            mutant[rng.choice(("x", f"{name}x", name.upper(), f"x.{name}"))] = tensor
        case 2:
            mutant[name] = rng.choice(SHAPES)(tensor) if tensor.ndim and tensor.numel() else tensor[None]
        case 3:
            mutant[name] = tensor.to(rng.choice([dtype for dtype in DTYPES if dtype != tensor.dtype]))
        case 4:
            mutant[name] = torch.full_like(tensor, rng.choice((0, 1)))
        case 5:
            mutant[rng.choice(("x", f"{name}x", f"x:{name}"))] = tensor
            mutant[name] = tensor
    return mutant


def resealed(file: Path, kind: str, target: Path, rng: random.Random) -> None:
    """Write a changed copy of a described file, with a digest of its own.

    Args:
        file: to copy.
        kind: key of its description.
        target: file to write.
        rng: draws the change: of the description two times in three, of the tensors otherwise.
    """
    content = read_described(file, kind, "file")
    description, tensors = content.description, content.tensors
    if rng.randrange(3):
        description = changed(description, rng)
    else:
        tensors = altered(tensors, rng)
    write_described(target, kind, description if isinstance(description, dict) else {"x": description}, tensors)
