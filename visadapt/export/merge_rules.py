"""Absorbing: one task's parts written into the weights of a plain copy of its backbone, each by its exact rule."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.batchnorm import carried, find_pairs
from visadapt.backbone.modules import is_stateful, plain_copy
from visadapt.backbone.norms import affine_of, is_batch_norm, is_norm
from visadapt.backbone.operators import is_operator, operator_of, plain_operator, rows_of
from visadapt.backbone.site import Site
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import Registry, facts_of
from visadapt.runtime.roles import role


@torch.no_grad()
def absorb(plain: nn.Module, source: nn.Module, registry: Registry, task: str) -> None:
    """Makes a plain copy of a backbone compute what one of its tasks does.

    Args:
        plain: the copy, whose weights are changed; after an error it is of no use.
        source: the injected backbone.
        registry: of its tasks.
        task: which of them.

    Raises:
        VisadaptError: something cannot be merged exactly; the site and the reason are named.
    """
    known = {site.full_name: site for site in facts_of(source).sites()} | registry.traced
    sites = {
        (known[name].host, placement.method.part): known[name]
        for placement in registry.task(task).placements
        for name in placement.sites
        if name in known
    }
    norms = Norms(plain)
    parts = registry.parts(task)
    for path in parts:
        _own(plain, path, parts[path])

    def order(path: str) -> int:
        linear = max((len(site.linear) for (host, _), site in sites.items() if host == path), default=0)
        return 0 if path in {c for site in sites.values() for c in site.linear[:1]} or not linear else linear

    # what stands behind a conv before what stands behind the norm that follows it
    for path in sorted(parts, key=order):
        constant: Tensor | None = None
        for name, part in parts[path].items():
            what = _what(name, path)
            if role(part) == "beside":
                _add(plain.get_submodule(path), part, what)
            elif role(part) == "after":
                site = sites.get((path, name)) or Site(path, "module", 0, "", 0)
                matrix, offset = _asked(part, "as_affine", what)
                if constant is not None:
                    # what those before it left over goes through it as well
                    shifted = matrix.double() * constant if matrix.ndim == 1 else matrix.double() @ constant
                    offset = shifted if offset is None else offset.double() + shifted
                constant = _after(plain, site, matrix, offset, what)
                if constant is not None:
                    last = (site, what)
        if constant is not None and constant.any():
            _into_norm(norms.after(last[0]), last[0], constant, last[1])


def _what(name: str, path: str) -> str:
    return f"{name} at {path or 'the root'}"


def _own(plain: nn.Module, path: str, parts: nn.ModuleDict) -> None:
    """Writes what stands instead of a host, or the weights that it computes with."""
    roles = {role(part) for part in parts.values()}
    for name, part in parts.items():
        what = _what(name, path)
        acting = role(part)
        if acting == "before":
            raise VisadaptError(f"the {what} cannot be merged: it changes its host's input")
        if acting == "instead":
            _replace(plain, path, part, what)
        elif acting == "weights" and "instead" not in roles:
            target = plain.get_submodule(path)
            _assign(target, part({key: own for key, own in target._parameters.items() if own is not None}))


class Norms:
    """Which BatchNorm alone takes a conv's output: found by one run on fake tensors, if it is asked at all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._pairs: dict[str, str] | None = None

    def after(self, site: Site) -> nn.Module | None:
        """The norm behind a site's host, None if none is known."""
        if not site.norm and self._pairs is None:
            try:
                self._pairs = dict(find_pairs(self.model))
            except VisadaptError:
                self._pairs = {}
        path = site.norm or cast("dict[str, str]", self._pairs).get(site.host)
        norm = self.model.get_submodule(path) if path else None
        return norm if norm is not None and is_stateful(norm) else None


def _asked(part: nn.Module, rule: str, what: str, *args: Any) -> Any:
    if not hasattr(part, rule):
        raise VisadaptError(f"the {what} cannot be merged: {type(part).__name__} has no rule for it")
    try:
        return getattr(part, rule)(*args)
    except VisadaptError as error:
        raise VisadaptError(f"the {what} cannot be merged: {error}") from error


def _replace(plain: nn.Module, path: str, part: nn.Module, what: str) -> None:
    if is_stateful(part) and part.training:
        raise VisadaptError(
            f"the {what} cannot be merged: it uses its batch's statistics in train mode; call eval() first"
        )
    target = plain.get_submodule(path)
    if not is_norm(part):
        own = plain_copy(part)
        dtype = next(target.parameters()).dtype
        plain.set_submodule(path, own.to(dtype))
        return
    _assign(target, dict(part.named_parameters()))
    for name, buffer in part._buffers.items():
        mine = target._buffers.get(name)
        if buffer is not None and mine is not None and part._parameters.get(name) is None:
            mine.copy_(buffer)


def _assign(target: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        module = target.get_submodule(path)
        parameter = module._parameters.get(last)
        # a FrozenBatchNorm2d has its affine part in buffers
        own = module._buffers[last] if parameter is None else parameter
        if own is not None and value is not own:
            own.copy_(value)


def _add(target: nn.Module, part: nn.Module, what: str) -> None:
    for name, delta in _asked(part, "as_kernel", what, target).items():
        own = target._parameters.get(name)
        if own is None:
            if bool(delta.any()):
                raise VisadaptError(f"the {what} cannot be merged: its host has no {name} to take its {name}")
            continue
        if name == "weight":
            _check_padding(target, delta, what)
        own.copy_(own.double() + delta.double())


def _check_padding(host: nn.Module, delta: Tensor, what: str) -> None:
    """Refuse a kernel that reaches beyond the edge where its host does not see zeros there, as the adapter does."""
    mode = getattr(host, "padding_mode", "zeros")
    if mode == "zeros" or delta.ndim < 3:
        return
    beyond = delta.detach().clone()
    centre: tuple[Any, ...] = (slice(None), slice(None), *operator_of(host, what).centre)
    beyond[centre] = 0
    if beyond.any():
        raise VisadaptError(
            f"the {what} cannot be merged: its host pads with its input (padding_mode={mode!r}) and it pads with zeros"
        )


def _after(plain: nn.Module, site: Site, matrix: Tensor, offset: Tensor | None, what: str) -> Tensor | None:
    """Writes y → M·y + c after a host into the weights that make y; returns the constant that has no place there."""
    host = plain.get_submodule(site.host)
    matrix = matrix.double()
    offset = torch.zeros(matrix.shape[0]).to(matrix) if offset is None else offset.double()
    if is_norm(host) and matrix.ndim == 1:
        _scale_norm(host, matrix, offset, what)
        return None
    chain = site.linear or ((site.host,) if is_operator(host) else ())
    if not chain:
        raise VisadaptError(
            f"the {what} cannot be merged: nothing linear ends at {site.host} ({type(host).__name__}), and a bias "
            "before the next, zero-padded conv would not be exact"
        )
    first = plain.get_submodule(chain[0])
    if len(chain) == 1:
        _compose(first, matrix, what)
        if first._parameters.get("bias") is None:
            return offset
        bias = cast("nn.Parameter", first.bias)
        bias.copy_((matrix * bias.double() if matrix.ndim == 1 else matrix @ bias.double()) + offset)
        return None
    # M·(s·(W∗x + b) + t) + c = (M·diag(s)·W)∗x + …: the norm behind the conv is left as the identity plus a constant
    norm = plain.get_submodule(chain[1])
    if not is_batch_norm(norm):
        raise VisadaptError(
            f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) is not a BatchNorm in eval mode"
        )
    if matrix.ndim == 1:
        _scale_norm(norm, matrix, offset, what)
        return None
    if carried(norm):
        raise VisadaptError(f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) ends in an activation")
    gamma, beta = _affine(norm, what)
    mean, var = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    root = (var + cast("float", norm.eps)).sqrt()
    scale = gamma.double() / root
    shift = beta.double() - mean * scale
    full = matrix * scale
    _compose(first, full, what)
    constant = matrix @ shift + offset
    if first._parameters.get("bias") is not None:
        constant = constant + full @ cast("Tensor", first.bias).double()
        cast("Tensor", first.bias).zero_()
    gamma.copy_(root)
    beta.copy_(constant + mean)
    return None


def _scale_norm(norm: nn.Module, scale: Tensor, offset: Tensor, what: str) -> None:
    """γ → scale·γ and β → scale·β + offset."""
    if any(not isinstance(child, nn.Identity) for child in norm.children()):
        raise VisadaptError(f"the {what} cannot be merged: the {type(norm).__name__} there ends in an activation")
    affine = affine_of(norm)
    if "bias" not in affine and "weight" in affine and not offset.any():
        alone = affine["weight"]
        alone.copy_(alone.double() * scale)
        return
    weight, bias = _affine(norm, what)
    weight.copy_(weight.double() * scale)
    bias.copy_(bias.double() * scale + offset)


def _affine(norm: nn.Module, what: str) -> tuple[Tensor, Tensor]:
    affine = affine_of(norm)
    weight, bias = affine.get("weight"), affine.get("bias")
    if weight is None or bias is None:
        raise VisadaptError(f"the {what} cannot be merged: the norm there has no weight or no bias to write into")
    return weight, bias


def _compose(layer: nn.Module, matrix: Tensor, what: str) -> None:
    """W → M·W for the output channels of a conv or linear."""
    try:
        operator = plain_operator(layer, what)
    except VisadaptError as error:
        raise VisadaptError(f"the {what} cannot be merged: {error}") from error
    if matrix.ndim == 2 and operator.groups != 1:
        raise VisadaptError(f"the {what} cannot be merged: a dense 1×1 after a grouped conv mixes its groups")
    weight = cast("nn.Parameter", layer.weight)
    rows = rows_of(weight, operator.transposed).double()
    rows = matrix[:, None] * rows if matrix.ndim == 1 else matrix @ rows
    weight.copy_(rows.t() if operator.transposed else rows.view_as(weight))


def _into_norm(norm: nn.Module | None, site: Site, offset: Tensor, what: str) -> None:
    """A constant that the conv has no bias for: the BatchNorm that follows subtracts that much less."""
    if norm is None:
        raise VisadaptError(
            f"the {what} cannot be merged: {site.host} has no bias, and no BatchNorm follows, to take its own"
        )
    mean = cast("Tensor", norm.running_mean)
    mean.copy_(mean.double() - offset)
