"""DAN: every kernel of a task is a linear combination of the backbone's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.operators import Operator, check_weight, operator_of, rows_of
from visadapt.backbone.site import Site
from visadapt.checks import check_flag, is_real
from visadapt.errors import VisadaptError
from visadapt.methods.method import Method
from visadapt.methods.stacking import Own
from visadapt.printable import shown


@dataclass(frozen=True)
class DAN(Method):
    """F̃ = W·F, with F a kernel as a matrix C_out × C_in·k² (Rosenfeld & Tsotsos 2018, arXiv 1705.04228, §3.1).

    The controller W is C_out×C_out, or diagonal with C_out parameters; the host's bias, if it has one, is the task's
    own. W is kept as I + D with D = 0 at the start, and the bias as its difference: the network starts as it was, bit
    for bit, and weight decay draws towards the backbone. No operation is added once the kernel is formed, and it
    merges always. By default at the 3×3 convolutions; the paper's ``where="conv"`` is all of them.

    Args:
        diagonal: scale each filter, rather than combine them.
        bits: None, or 2 to 8: D is rounded, row by row, to that many bits around zero, in every forward (gradients
            pass through), so that the stored values, packed integers and a scale per row, are those that were trained.
            The paper finds no loss at 8 and 6 bits. A state dict holds the rounded D as well.
        alpha: how much of the change acts: 1 the task's kernels, 0 the backbone's, a mixture between (the paper's
            switch α). `set_alpha` sets it afterwards.

    Raises:
        VisadaptError: an option is out of range; a site is not a convolution or linear, or its weight is not a
            parameter.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.DAN(diagonal=True), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv3x3",)

    diagonal: bool = False
    bits: int | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_flag(self.diagonal, "diagonal")
        if self.bits is not None and not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise VisadaptError(f"bits must be None or an integer from 2 to 8, got {shown(self.bits)}")
        check_alpha(self.alpha)

    def build(self, site: Site, host: nn.Module) -> nn.Module:
        operator = operator_of(host, site.full_name)
        check_weight(host, site.full_name)
        return Controller(self, operator, host._parameters.get("bias") is not None)


def check_alpha(alpha: Any) -> None:
    """Refuse anything but a number in [0, 1]."""
    if not is_real(alpha) or not 0 <= alpha <= 1:
        raise VisadaptError(
            f"alpha must be a number from 0 (the backbone's kernels) to 1 (the task's), got {shown(alpha)}"
        )


class Controller(nn.Module):
    """The module of `DAN` at one site: D, and the difference of the bias."""

    role: ClassVar[str] = "weights"

    def __init__(self, method: DAN, operator: Operator, bias: bool) -> None:
        super().__init__()
        self.alpha = method.alpha
        self.bits = method.bits
        self.transposed = operator.transposed
        rows = operator.outputs
        self.controller = nn.Parameter(torch.zeros(rows) if method.diagonal else torch.zeros(rows, rows))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    @property
    def names(self) -> tuple[str, ...]:
        """The host's parameters that it changes."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def forward(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._changed(parameters, self.controller, self.bias)

    def rowwise(self, parameters: dict[str, Tensor], own: Own) -> dict[str, Tensor]:
        """The same for a batch whose samples have tensors of their own."""
        return self._changed(parameters, own("controller", False), None if self.bias is None else own("bias", False))

    def _changed(self, parameters: dict[str, Tensor], controller: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
        """The changed parameters, or one of each per sample where D and the bias are."""
        changed = {}
        if "weight" in parameters:
            changed["weight"] = self._combined(parameters["weight"], controller)
        if shift is not None and "bias" in parameters:
            bias = parameters["bias"]
            changed["bias"] = bias + (self.alpha * shift).to(bias.dtype)
        return changed

    def _combined(self, weight: Tensor, controller: Tensor) -> Tensor:
        own = torch.promote_types(weight.dtype, controller.dtype)
        d = (controller if self.bits is None else rounded(controller, self.bits)).to(own)
        matrix = rows_of(weight, self.transposed).to(own)
        delta = d[..., None] * matrix if self.controller.ndim == 1 else d @ matrix
        delta = delta.mT if self.transposed else delta.view(*delta.shape[:-2], *weight.shape)
        return weight + (self.alpha * delta).to(weight.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bits is not None:
            own = destination.pop(f"{prefix}controller").detach()
            codes, scale = quantised(own, self.bits)
            destination[f"{prefix}codes"] = packed(codes, self.bits)
            destination[f"{prefix}scale"] = scale.flatten()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.bits is not None and {f"{prefix}codes", f"{prefix}scale"} <= state_dict.keys():
            codes, scale = state_dict.pop(f"{prefix}codes"), state_dict.pop(f"{prefix}scale")
            shape = self.controller.shape
            values = unpacked(codes, self.bits, shape.numel()).view(shape).to(scale.dtype)
            state_dict[f"{prefix}controller"] = values * (scale[:, None] if len(shape) == 2 else scale)
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantised(d: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers of ``bits`` bits around zero and the scale of each row (of the whole, for a vector): d ≈ codes·scale.

    The scale is rounded to so few digits that multiplying a code by it is exact: quantising again what was quantised
    gives the same codes and scales, bit for bit.
    """
    largest = 2 ** (bits - 1) - 1
    scale = d.abs().amax(dim=-1, keepdim=True) / largest
    # Veltkamp's splitting keeps the upper digits: 2⁸ + 1 leaves 16 of an fp32's 24
    big = scale * (2**8 + 1)
    scale = big - (big - scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (d / scale).round().clamp(-largest, largest), scale


def rounded(d: Tensor, bits: int) -> Tensor:
    """The nearest values that are stored; the gradient is that of d itself (straight through)."""
    codes, scale = quantised(d.detach(), bits)
    return codes * scale + (d - d.detach())


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as a string of bits, eight per byte."""
    whole = codes.flatten().to(torch.int64) + 2 ** (bits - 1) - 1
    flat = (whole[:, None] >> torch.arange(bits, device=codes.device) & 1).flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `packed` packed."""
    flat = (stored.to(torch.int64)[:, None] >> torch.arange(8, device=stored.device) & 1).flatten()[: count * bits]
    whole = (flat.view(count, bits) << torch.arange(bits, device=stored.device)).sum(1)
    codes: Tensor = whole - (2 ** (bits - 1) - 1)
    return codes
