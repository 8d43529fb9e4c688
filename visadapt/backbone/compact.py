"""Frozen weights kept in fewer bytes: rounded to half precision, or as 8-bit codes with a scale per output channel."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from visadapt.errors import VisadaptError
from visadapt.tensor_file import raw

_ALIGNMENT = 64


class Stored:
    """What a compact weight holds, shared by all tensors that stand for the same weight.

    Attributes:
        values: the weight in fewer bits, or its codes (int8); in the weight's shape and memory format.
        scale: of the codes, one number per output channel, in a shape that broadcasts; None without codes.
        dtype: of the weight that it stands for.
        original: that weight, on the CPU; None if it was not kept.
    """

    def __init__(
        self,
        values: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        original: Tensor | None = None,
        digest: bytes | None = None,
    ) -> None:
        self.values, self.scale, self.dtype, self.original, self._digest = values, scale, dtype, original, digest

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes of the weight that it stands for."""
        if self._digest is None:
            self._digest = digest_of(self.exact())
        return self._digest

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that layers compute with, in a dtype; they may be the very tensor that is held."""
        return self.values.to(dtype) if self.scale is None else self.values.to(dtype) * self.scale.to(dtype)

    def exact(self) -> Tensor:
        """A new tensor of the original values, or of those that layers compute with if these were not kept."""
        if self.original is None:
            dense = self.dense(self.dtype)
            return dense.clone() if dense is self.values else dense
        return torch.empty_like(self.values, dtype=self.dtype).copy_(self.original)

    def copied(self, dtype: torch.dtype | None = None, **to: Any) -> Stored:
        """The same in memory of its own; the original, which is only read, is shared.

        Args:
            dtype: of the weight that the copy stands for; the same if None.
            **to: a device or a memory format for the values.
        """
        device = {key: value for key, value in to.items() if key == "device"}
        scale = None if self.scale is None else self.scale.to(copy=True, **device)
        other = dtype not in (None, self.dtype)
        return Stored(
            self.values.to(copy=True, **to), scale, dtype or self.dtype, self.original, None if other else self._digest
        )

    def write(self, weight: Tensor) -> None:
        """Replace the values, and the original if it was kept, by those of another weight."""
        own = weight.detach().to(self.dtype)
        if self.scale is None:
            self.values.copy_(own)
        else:
            codes, scale = quantised(own, _channel_axis(self.scale))
            self.values.copy_(codes)
            self.scale.copy_(scale)
        self.original = None if self.original is None else own.cpu().contiguous().clone()
        self._digest = None


class Compact(Tensor):
    """A weight kept in fewer bytes, with the shape, dtype and device of the weight that it stands for.

    Layers that support it compute with the stored values; every other operator gets a temporary tensor of the rounded
    values. A clone is an ordinary tensor, of the original values where these were kept.

    Args:
        stored: what it holds.
    """

    stored: Stored

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Stored) -> Compact:
        values = stored.values
        made: Compact = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), dtype=stored.dtype, device=values.device
        )
        made.stored = stored
        return made

    def __init__(self, stored: Stored) -> None:
        pass

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that layers compute with, in a dtype."""
        return self.stored.dense(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = as_parameter(self.stored.copied())
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        held = self.stored
        # of a mapped file, pickle would write all of it
        original = None if held.original is None else held.original.clone()
        return _rebuilt, (held.values, held.scale, held.dtype, original, held._digest)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Compact({tuple(self.shape)}, {self.dtype} as {self.stored.values.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_held"] if self._held_scale is None else ["_held", "_held_scale"], self.stored.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Compact:
        return cls(Stored(inner["_held"], inner.get("_held_scale"), dtype))

    @property
    def _held(self) -> Tensor:
        return self.stored.values

    @property
    def _held_scale(self) -> Tensor | None:
        return self.stored.scale

    def _stable_hash_for_caching(self) -> str:
        return f"{self.stored.dtype} {self.stored.values.dtype}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Compact) and func in _OPERATORS:
            return _OPERATORS[func](first, *args[1:], **kwargs)
        made: list[tuple[Compact, Tensor]] = []

        def dense(weight: Compact) -> Tensor:
            made.append((weight, weight.dense(weight.stored.dtype)))
            return made[-1][1]

        plain_args, plain_kwargs = tree_map_only(Compact, dense, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable:
            written = [a for a, spec in zip(plain_args, func._schema.arguments, strict=False) if spec.is_write]
            for weight, values in made:
                if any(values is each for each in written):
                    weight.stored.write(values)
            return next((weight for weight, values in made if values is out), out)
        return out


def _clone(weight: Compact, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    exact = weight.stored.exact()
    return exact if memory_format is torch.preserve_format else exact.contiguous(memory_format=memory_format)


def _copied(weight: Compact, **to: Any) -> Compact:
    # compact still: Module.to assigns the result to the parameter
    known = {key: to[key] for key in ("dtype", "device", "memory_format") if to.get(key) is not None}
    return Compact(weight.stored.copied(**known))


def _overwritten(weight: Compact, other: Tensor, non_blocking: bool = False) -> Compact:
    weight.stored.write(other.stored.exact() if isinstance(other, Compact) else other)
    return weight


_OPERATORS: dict[Any, Any] = {
    torch.ops.aten.detach.default: lambda weight: Compact(weight.stored),
    torch.ops.aten.alias.default: lambda weight: Compact(weight.stored),
    torch.ops.aten.clone.default: _clone,
    torch.ops.aten._to_copy.default: _copied,
    torch.ops.aten.copy_.default: _overwritten,
}
"""Operators that act on what is held; all others act on a temporary tensor of the rounded values."""


def as_parameter(stored: Stored) -> nn.Parameter:
    """A frozen parameter that holds this."""
    return nn.Parameter(Compact(stored), requires_grad=False)


def _rebuilt(*held: Any) -> nn.Parameter:
    return as_parameter(Stored(*held))


def digest_of(weight: Tensor) -> bytes:
    """SHA-256 of a tensor's values, as a backbone's fingerprint takes it."""
    return hashlib.sha256(raw(weight)).digest()


def quantised(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Codes in −127…127 and scales with W ≈ scale·codes: scale = max|W| / 127 per channel, rounded to nearest.

    Args:
        weight: of any shape.
        axis: of the output channels.

    Returns:
        Codes (int8, in the weight's memory format) and scales (fp32, in a shape that broadcasts). A weight that was
        read from such codes, as the bundled ResNet-50's are, comes back within the rounding of fp32.
    """
    others = [each for each in range(weight.ndim) if each != axis]
    wide = weight.detach().float()
    scale = wide.abs().amax(others, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _channel_axis(scale: Tensor) -> int:
    return next((axis for axis, size in enumerate(scale.shape) if size > 1), 0)


def mapped(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to a temporary file that is mapped into memory: they take disk space, and memory only while read.

    The file is unlinked before this returns; its space is freed with the last tensor.

    Raises:
        VisadaptError: the file cannot be written.
    """
    places, end = [], 0
    for weight in weights:
        places.append(end)
        end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "weights"
            with path.open("wb") as file:
                for weight in weights:
                    file.write(raw(weight))
                    file.write(bytes(-weight.nbytes % _ALIGNMENT))
            whole = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
    except OSError as error:
        raise VisadaptError(
            f"the {end / 1e6:.0f} MB of the backbone's weights cannot be written to {tempfile.gettempdir()} "
            f"({error}): pass original='memory' to keep them there, or None to do without them"
        ) from error
    return [
        whole[place : place + weight.nbytes].view(weight.dtype).view(weight.shape)
        for place, weight in zip(places, weights, strict=True)
    ]
