"""Merging: a task's parts written into the backbone's own weights, exactly, or a refusal with the reason."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visadapt import heads
from visadapt.errors import VisadaptError
from visadapt.families import find_sites
from visadapt.folding import carried, pairs
from visadapt.folding import fold as fold_norms
from visadapt.host import is_stateful, role
from visadapt.norms import is_norm
from visadapt.operators import is_operator, plain_operator, rows_of
from visadapt.registry import Registry, find_registry, registry_of, unwrapped
from visadapt.sites import Site
from visadapt.tasks import guard, using
from visadapt.trace import bare, call, guess_inputs

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05}
"""Largest error, relative to the largest output, that a merge may show on its probe, by the lowest precision in it."""


def merge(
    model: nn.Module, task: str | None = None, *, inplace: bool = False, fold: bool = False, probe: Any = None
) -> nn.Module:
    """A plain backbone that computes what the task does: same class, same keys, no trace of visadapt.

    Exact rules: what acts on weights is written into them; a kernel beside a conv or linear is added to it (a 1×1 at
    the centre tap of a k×k); a linear map M·y + c after a conv or linear gives M·W and M·b + c, and passes through the
    eval-mode norm behind a conv; norms and heads take the place of the backbone's. The merged model is then compared
    with the task on a probe; the largest error is logged (logger ``visadapt.merge``), and one that is no rounding is
    refused.

    Args:
        model: an injected model, in eval mode if the task has statistics of its own.
        task: its name; None for the active one.
        inplace: write into ``model`` itself and take all tasks out of it; :func:`unmerge` undoes that, bit for bit.
            Otherwise ``model`` stays as it is and a copy is merged.
        fold: afterwards fold every eval-mode BatchNorm into the conv before it (see :func:`visadapt.fold`).
        probe: an input to compare on, as :func:`visadapt.sites` takes an example; guessed if None; False for no
            comparison.

    Returns:
        The plain model, in eval mode.

    Raises:
        VisadaptError: something cannot be merged exactly; the site and the reason are named. Nothing was changed then.
    """
    registry = registry_of(model)
    name = registry.task(registry.current() if task is None else task).name
    source = unwrapped(model)
    plain = heads.plain_copy(source)
    _forget(plain, registry)
    _merge_into(source, registry, name, plain)
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(key in registry.trained)
    _tell_width(plain, registry, name)
    plain.eval()
    if fold:
        plain = fold_norms(plain, example=None if probe is False else probe)
    if probe is not False:
        error, largest = merge_error(source, plain, name, probe)
        low = any(p.dtype in (torch.float16, torch.bfloat16) for p in plain.parameters())
        wide = all(p.dtype == torch.float64 for p in plain.parameters())
        log.info("merged %r: largest error %.2g where outputs reach %.3g", name, error, largest)
        if not error <= TOLERANCE[torch.float16 if low else torch.float64 if wide else torch.float32] * largest:
            raise VisadaptError(
                f"merging {name!r} changed the outputs by {error:.2g} (they reach {largest:.3g}): refused"
            )
    return _move_into(source, plain) if inplace else plain


def _forget(plain: nn.Module, registry: Registry) -> None:
    """Takes what is left of visadapt out of a plain copy of an injected model."""
    plain.__dict__.pop("_visadapt", None)
    for handle in registry.guards:
        for name, hooks in plain.__dict__.items():
            if name.startswith("_forward_"):
                hooks.pop(handle.id, None)


@torch.no_grad()
def merge_error(model: nn.Module, merged: nn.Module, task: str, probe: Any = None) -> tuple[float, float]:
    """The largest absolute difference between a task's outputs and a merged model's, and the largest output.

    Args:
        model: the injected model.
        merged: what :func:`merge` gave.
        task: name of the task.
        probe: an input; images drawn from a normal, or tokens, if None.
    """
    with bare(model), using(model, task):
        expected, probe = _answer(model, probe)
    found = _tensors(call(merged, probe))
    error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    return error, max(float(t.abs().max()) for t in expected)


def _answer(model: nn.Module, probe: Any) -> tuple[list[Tensor], Any]:
    if probe is not None:
        return _tensors(call(model, probe)), probe
    failure: Exception | None = None
    generator = torch.Generator().manual_seed(0)
    for guess in guess_inputs(model):
        drawn = guess
        if isinstance(guess, Tensor) and guess.is_floating_point():
            drawn = torch.randn(guess.shape, generator=generator).to(guess)
        try:
            return _tensors(call(model, drawn)), drawn
        except Exception as error:
            failure = failure or error
    raise VisadaptError(
        f"{type(model).__name__} does not run on a guessed input ({failure}): pass probe= with one that it takes, "
        "or probe=False to merge without comparing"
    ) from failure


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]


def _move_into(model: nn.Module, plain: nn.Module) -> nn.Module:
    registry = registry_of(model)
    guarded = bool(registry.guards)
    for handle in registry.guards:
        handle.remove()
    registry.guards = ()
    # all but the hooks, whose handles the user may hold
    kept = _exchange(model, plain.__dict__)
    model.__dict__["_visadapt_merged"] = (type(model), kept, guarded)
    model.__class__ = type(plain)
    return model


def _exchange(model: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """Gives a module other attributes, and returns those it had: all but the hooks, whose handles the user may hold."""
    kept = {key: value for key, value in model.__dict__.items() if "_hooks" not in key}
    for key in kept:
        del model.__dict__[key]
    model.__dict__.update({key: value for key, value in attributes.items() if "_hooks" not in key})
    return kept


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes an in-place merge: the injected model with all its tasks, bit for bit.

    Args:
        model: what ``merge(model, task, inplace=True)`` gave.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was not merged in place.
    """
    if "_visadapt_merged" not in model.__dict__:
        raise VisadaptError(f"this {type(model).__name__} was not merged in place: there is nothing to unmerge")
    if find_registry(model) is not None:
        raise VisadaptError("this model was given new tasks after the merge: visadapt.eject them first")
    cls, kept, guarded = model.__dict__["_visadapt_merged"]
    _exchange(model, kept)
    model.__class__ = cls
    if guarded:
        guard(model)
    return model


@torch.no_grad()
def _merge_into(source: nn.Module, registry: Registry, task: str, plain: nn.Module) -> None:
    known = {site.full_name: site for site in find_sites(source)} | registry.traced
    sites = {
        (known[name].host, placement.method.part): known[name]
        for placement in registry.task(task).placements
        for name in placement.sites
        if name in known
    }
    norms = Norms(plain)
    parts = registry.parts(task)
    # weights of a whole before those of what is in it
    for path in sorted(parts, key=len):
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
            _assign(target, part(dict(target.named_parameters(remove_duplicate=False))))


class Norms:
    """Which BatchNorm alone takes a conv's output: found by one run on fake tensors, if it is asked at all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._pairs: dict[str, str] | None = None

    def after(self, site: Site) -> nn.Module | None:
        """The norm behind a site's host, None if none is known."""
        if not site.norm and self._pairs is None:
            try:
                self._pairs = dict(pairs(self.model))
            except VisadaptError:
                self._pairs = {}
        path = site.norm or cast("dict[str, str]", self._pairs).get(site.host)
        norm = self.model.get_submodule(path) if path else None
        return norm if norm is not None and is_stateful(norm) else None


def _tell_width(plain: nn.Module, registry: Registry, task: str) -> None:
    """Lets the attributes that libraries keep of a head's width follow the merged head."""
    width = registry.task(task).num_classes
    if task in registry.configs:
        plain.__dict__["config"] = copy.deepcopy(registry.configs[task])
    for name in ("num_labels", "num_classes"):
        if width is not None and isinstance(plain.__dict__.get(name), int):
            plain.__dict__[name] = width


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
        own = heads.plain_copy(part)
        dtype = next(target.parameters()).dtype
        plain.set_submodule(path, own.to(dtype))
        return
    _assign(target, dict(part.named_parameters()))
    for name, buffer in part._buffers.items():
        mine = target._buffers.get(name)
        if buffer is not None and mine is not None:
            mine.copy_(buffer)


def _assign(target: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        own = target.get_parameter(name)
        if value is not own:
            own.copy_(value)


def _add(target: nn.Module, part: nn.Module, what: str) -> None:
    for name, delta in _asked(part, "as_kernel", what, target).items():
        own = target._parameters.get(name)
        if own is None:
            if bool(delta.any()):
                raise VisadaptError(f"the {what} cannot be merged: its host has no {name} to take its {name}")
            continue
        own.copy_(own.double() + delta.double())


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
    if not is_stateful(norm) or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise VisadaptError(
            f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) is no BatchNorm in eval mode"
        )
    if matrix.ndim == 1:
        _scale_norm(norm, matrix, offset, what)
        return None
    if carried(norm):
        raise VisadaptError(f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) ends in an activation")
    weight, bias = _affine(norm, what)
    mean, var = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    root = (var + norm.eps).sqrt()
    scale = weight.double() / root
    shift = bias.double() - mean * scale
    full = matrix * scale
    _compose(first, full, what)
    constant = matrix @ shift + offset
    if first._parameters.get("bias") is not None:
        constant = constant + full @ cast("Tensor", first.bias).double()
        cast("Tensor", first.bias).zero_()
    weight.copy_(root)
    bias.copy_(constant + mean)
    return None


def _scale_norm(norm: nn.Module, scale: Tensor, offset: Tensor, what: str) -> None:
    """γ → scale·γ and β → scale·β + offset."""
    if any(not isinstance(child, nn.Identity) for child in norm.children()):
        raise VisadaptError(f"the {what} cannot be merged: the {type(norm).__name__} there ends in an activation")
    if norm._parameters.get("bias") is None and norm._parameters.get("weight") is not None and not offset.any():
        own = cast("nn.Parameter", norm.weight)
        own.copy_(own.double() * scale)
        return
    weight, bias = _affine(norm, what)
    weight.copy_(weight.double() * scale)
    bias.copy_(bias.double() * scale + offset)


def _affine(norm: nn.Module, what: str) -> tuple[nn.Parameter, nn.Parameter]:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
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
