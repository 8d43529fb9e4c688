"""Rules that write one task's parts into the weights of a plain copy of its backbone, exactly."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.batchnorm import carried, find_pairs, is_watched
from visadapt.backbone.modules import is_stateful, joined, last_name, parent, plain_copy
from visadapt.backbone.norms import affine_of, is_batch_norm, is_norm
from visadapt.backbone.operators import Operator, is_operator, plain_operator, rows_of
from visadapt.backbone.site import Site
from visadapt.errors import VisadaptError
from visadapt.export.readers import foreign_reader
from visadapt.export.weights import Weights
from visadapt.runtime.registry import Registry, facts_of
from visadapt.runtime.roles import role


@torch.no_grad()
def absorb(
    plain: nn.Module, source: nn.Module, registry: Registry, task: str, example: Any = None, measured: bool = True
) -> None:
    """Make a plain copy of a backbone compute what one of its tasks does.

    Args:
        plain: the copy, whose weights are changed; after an error it is unusable.
        source: the injected backbone.
        registry: of its tasks.
        task: which of them.
        example: an input, as `visadapt.sites` takes it; guessed if None.
        measured: whether the outputs of the two will be compared. If not, two errors that only a comparison would show
            are checked for: weights that other modules read too, and changes that are lost by rounding.

    Raises:
        VisadaptError: something cannot be merged exactly; the site and the reason are named.
    """
    names = {name for placement in registry.task(task).placements for name in placement.sites}
    known = dict(registry.traced)
    if not names <= known.keys():
        known |= {site.full_name: site for site in facts_of(source).sites(example)}
    sites = {
        (known[name].host, placement.method.part): known[name]
        for placement in registry.task(task).placements
        for name in placement.sites
        if name in known
    }
    rules = _Rules(plain, Norms(source, example))
    parts = registry.parts(task)
    for path in parts:
        rules.own(path, parts[path])

    def order(path: str) -> int:
        linear = max((len(site.linear) for (host, _), site in sites.items() if host == path), default=0)
        return 0 if path in {c for site in sites.values() for c in site.linear[:1]} or not linear else linear

    # parts behind a conv come before parts behind the norm that follows it
    for path in sorted(parts, key=order):
        rules.around(path, parts[path], sites)
    if not measured:
        rules.check_readers(source, registry.example if example is None else example)
    rules.weights.settle(measured)


class Norms:
    """The BatchNorm that is the only consumer of a conv's output, found by one run on fake tensors when first needed.

    Args:
        model: the injected backbone.
        example: an input to run it on; guessed if None.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self.model, self.example = model, example
        self._pairs: dict[str, str] | None = None

    def found(self) -> dict[str, str]:
        """Paths of convs and of the norms behind them; none if the model cannot be run."""
        if self._pairs is None:
            try:
                self._pairs = dict(find_pairs(self.model, self.example))
            except VisadaptError:
                self._pairs = {}
        return self._pairs

    def after(self, site: Site) -> str | None:
        """Path of the norm behind a site's host, None if none is known."""
        return site.norm or self.found().get(site.host)

    def check(self, site: Site, conv: nn.Module, what: str) -> None:
        """Refuse to rewrite a conv and norm together if something else reads the tensor between them."""
        traced = site.traced and self.found().get(site.linear[0]) != site.linear[1]
        if traced or is_watched(conv):
            raise VisadaptError(
                f"the {what} cannot be merged: it is not certain that {site.linear[1]} alone sees what "
                f"{site.linear[0]} gives"
            )


class _Rules:
    """The exact rules, one for each way in which a part acts.

    Args:
        plain: the copy of the backbone.
        norms: of the backbone.
    """

    def __init__(self, plain: nn.Module, norms: Norms) -> None:
        self.plain, self.norms, self.weights = plain, norms, Weights(plain)
        self._everywhere: set[tuple[nn.Module, str]] = set()

    def own(self, path: str, parts: nn.ModuleDict) -> None:
        """Write the part that replaces a host, or the weights that it computes with."""
        roles = {role(part) for part in parts.values()}
        for name, part in parts.items():
            what = _what(name, path)
            acting = role(part)
            if acting == "before":
                raise VisadaptError(f"the {what} cannot be merged: it changes its host's input")
            if acting == "watch":
                raise VisadaptError(f"the {what} cannot be merged: it feeds a network beside the backbone")
            if acting == "instead":
                self._replace(path, part, what)
            elif acting == "weights" and "instead" not in roles:
                self._assign(path, part, what)

    def around(self, path: str, parts: nn.ModuleDict, sites: dict[tuple[str, str], Site]) -> None:
        """Write the parts beside and behind a host."""
        constant: Tensor | None = None
        last = Site(path, "module", 0, "", 0), ""
        for name, part in parts.items():
            what = _what(name, path)
            if role(part) == "beside":
                self._add(self.plain.get_submodule(path), part, what)
            elif role(part) == "after":
                site = sites.get((path, name)) or Site(path, "module", 0, "", 0)
                matrix, offset = _asked(part, "as_affine", what)
                matrix = matrix.double()
                offset = torch.zeros(matrix.shape[0]).to(matrix) if offset is None else offset.double()
                if constant is not None:
                    # the constant that earlier parts left over goes through it as well
                    offset = offset + (matrix * constant if matrix.ndim == 1 else matrix @ constant)
                constant = self._after(site, matrix, offset, what)
                last = site, what
        if constant is not None and constant.any():
            self._into_norm(*last, constant)

    def check_readers(self, source: nn.Module, example: Any) -> None:
        """Refuse weights that another module than the host reads: an adapter does not act there."""
        paths = {module: path for path, module in self.plain.named_modules()}
        everywhere = {joined(paths.get(module, ""), name) for module, name in self._everywhere}
        written = {name: what for name, what in self.weights.written() if name not in everywhere}
        try:
            readers = foreign_reader(source, set(written), example)
        except VisadaptError as error:
            raise VisadaptError(
                f"it cannot be seen whether other modules compute with what the {next(iter(written.values()))} "
                f"changes: {error}, or as probe="
            ) from error
        for name, reader in readers.items():
            raise VisadaptError(
                f"the {written[name]} cannot be merged: {reader or 'the model'} computes with {name} itself"
            )

    def _replace(self, path: str, part: nn.Module, what: str) -> None:
        if is_stateful(part) and part.training:
            raise VisadaptError(
                f"the {what} cannot be merged: it uses its batch's statistics in train mode; call eval() first"
            )
        target = self.plain.get_submodule(path)
        if not is_norm(part):
            own = plain_copy(part)
            dtype = next(target.parameters()).dtype
            self.plain.set_submodule(path, own.to(dtype))
            return
        # a part may have both of one name, where its own weight stands before a buffer: parameters last, as torch reads
        for name, value in (*part.named_buffers(), *part.named_parameters()):
            inner, last = parent(name), last_name(name)
            module = target.get_submodule(inner)
            if (module, last) not in self.weights:
                continue
            if value.is_floating_point():
                self.weights.write(module, last, value, what)
            else:
                cast("Tensor", module._buffers[last]).copy_(value)

    def _assign(self, path: str, part: nn.Module, what: str) -> None:
        host = self.plain.get_submodule(path)
        owned = {name: own for name, own in host._parameters.items() if own is not None}
        gone = [name for name in getattr(part, "names", ()) if name not in owned]
        if gone:
            raise VisadaptError(
                f"the {what} cannot be merged: the {gone[0]} of its host is not a parameter now, but computed anew "
                "in every forward (weight norm, pruning, …)"
            )
        present = {name: self.weights.present(host, name) for name in owned}
        for name, value in part(present).items():
            if value is not present[name]:
                # the task computes with them in the host's dtype as well
                self.weights.write(host, name, value.to(owned[name].dtype), what)
                self._everywhere.add((host, name))

    def _add(self, host: nn.Module, part: nn.Module, what: str) -> None:
        for name, delta in _asked(part, "as_kernel", what, host).items():
            if host._parameters.get(name) is None:
                if bool(delta.any()):
                    raise VisadaptError(f"the {what} cannot be merged: its host has no {name} to take its {name}")
                continue
            if name == "weight":
                _check_padding(host, delta, what)
            self.weights.write(host, name, self.weights.read(host, name) + delta.double(), what)

    def _after(self, site: Site, matrix: Tensor, offset: Tensor, what: str) -> Tensor | None:
        """Write y → M·y + c behind a host into the weights that make y; return the constant that has no place."""
        if _is_identity(matrix) and not offset.any():
            return None
        host = self.plain.get_submodule(site.host)
        if is_norm(host) and matrix.ndim == 1:
            self._scale_norm(host, matrix, offset, what)
            return None
        chain = site.linear or ((site.host,) if is_operator(host) else ())
        if not chain:
            raise VisadaptError(
                f"the {what} cannot be merged: nothing linear ends at {site.host} ({type(host).__name__}), and a bias "
                "before the next, zero-padded conv would not be exact"
            )
        first = self.plain.get_submodule(chain[0])
        if len(chain) == 1:
            self._compose(first, matrix, what)
            if first._parameters.get("bias") is None:
                return offset
            bias = self.weights.read(first, "bias")
            self.weights.write(first, "bias", (matrix * bias if matrix.ndim == 1 else matrix @ bias) + offset, what)
            return None
        norm = self.plain.get_submodule(chain[1])
        if not is_batch_norm(norm):
            raise VisadaptError(
                f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) is not a BatchNorm in eval mode"
            )
        if matrix.ndim == 1:
            self._scale_norm(norm, matrix, offset, what)
            return None
        if carried(norm):
            raise VisadaptError(
                f"the {what} cannot be merged: {chain[1]} ({type(norm).__name__}) ends in an activation"
            )
        self.norms.check(site, first, what)
        self._through_norm(first, norm, matrix, offset, what)
        return None

    def _through_norm(self, conv: nn.Module, norm: nn.Module, matrix: Tensor, offset: Tensor, what: str) -> None:
        """Write M·(s⊙(W∗x + b) + t) + c as s'⊙(W'∗x + b') + t', with W' = diag(1/s')·M·diag(s)·W.

        The norm's scale s' is its own s where that is not near 0, so that W' differs from W only by the task's change.
        """
        _check_affine(norm, what)
        read = self.weights.read
        weight, bias = read(norm, "weight"), read(norm, "bias")
        mean, root = read(norm, "running_mean"), (read(norm, "running_var") + cast("float", norm.eps)).sqrt()
        scale = weight / root
        shift = bias - mean * scale
        kept = torch.where(scale.abs() > scale.abs().max() / 64, scale, torch.ones_like(scale))
        full = matrix * scale / kept[:, None]
        self._compose(conv, full, what)
        if conv._parameters.get("bias") is not None:
            self.weights.write(conv, "bias", full @ read(conv, "bias"), what)
        self.weights.write(norm, "weight", torch.where(kept == scale, weight, kept * root), what)
        self.weights.write(norm, "bias", matrix @ shift + offset + mean * kept, what)

    def _scale_norm(self, norm: nn.Module, scale: Tensor, offset: Tensor, what: str) -> None:
        """γ → scale·γ and β → scale·β + offset."""
        if any(not isinstance(child, nn.Identity) for child in norm.children()):
            raise VisadaptError(f"the {what} cannot be merged: the {type(norm).__name__} there ends in an activation")
        read, write = self.weights.read, self.weights.write
        affine = affine_of(norm)
        if "bias" not in affine and "weight" in affine and not offset.any():
            write(norm, "weight", read(norm, "weight") * scale, what)
            return
        _check_affine(norm, what)
        write(norm, "weight", read(norm, "weight") * scale, what)
        write(norm, "bias", read(norm, "bias") * scale + offset, what)

    def _compose(self, layer: nn.Module, matrix: Tensor, what: str) -> None:
        """W → M·W for the output channels of a conv or linear."""
        operator = _plain_operator(layer, what)
        if matrix.ndim == 2 and operator.groups != 1:
            raise VisadaptError(f"the {what} cannot be merged: a dense 1×1 after a grouped conv mixes its groups")
        rows = rows_of(self.weights.read(layer, "weight"), operator.transposed)
        rows = matrix[:, None] * rows if matrix.ndim == 1 else matrix @ rows
        self.weights.write(layer, "weight", rows.t() if operator.transposed else rows, what)

    def _into_norm(self, site: Site, what: str, constant: Tensor) -> None:
        """Write a constant for which the conv has no bias into the running mean of the BatchNorm that follows."""
        path = self.norms.after(site)
        norm = self.plain.get_submodule(path) if path else None
        if norm is None or not is_stateful(norm):
            raise VisadaptError(
                f"the {what} cannot be merged: {site.host} has no bias, and no BatchNorm follows, to take its own"
            )
        self.weights.write(norm, "running_mean", self.weights.read(norm, "running_mean") - constant, what)


def _what(name: str, path: str) -> str:
    return f"{name} at {path or 'the root'}"


def _asked(part: nn.Module, rule: str, what: str, *args: Any) -> Any:
    if not hasattr(part, rule):
        raise VisadaptError(f"the {what} cannot be merged: {type(part).__name__} has no rule for it")
    try:
        return getattr(part, rule)(*args)
    except VisadaptError as error:
        raise VisadaptError(f"the {what} cannot be merged: {error}") from error


def _plain_operator(layer: nn.Module, what: str) -> Operator:
    try:
        return plain_operator(layer, what)
    except VisadaptError as error:
        raise VisadaptError(f"the {what} cannot be merged: {error}") from error


def _check_padding(host: nn.Module, delta: Tensor, what: str) -> None:
    """Refuse a kernel that reaches beyond the edge where its host does not see zeros there, as the adapter does."""
    mode = getattr(host, "padding_mode", "zeros")
    operator = _plain_operator(host, what)
    if mode == "zeros" or not operator.conv:
        return
    inside: list[slice] = []
    for axis, (size, dilation) in enumerate(zip(operator.kernel, operator.dilation, strict=True)):
        padding = dilation * (size - 1) if operator.padding is None else 2 * operator.padding[axis]
        # taps that read nothing of what is padded before the input, nor of what is padded behind it
        first, last = -(-(padding // 2) // dilation), -(-(padding - padding // 2) // dilation)
        inside.append(slice(first, max(size - last, first)))
    beyond = delta.detach().clone()
    index: tuple[slice, ...] = (slice(None), slice(None), *inside)
    beyond[index] = 0
    if beyond.any():
        raise VisadaptError(
            f"the {what} cannot be merged: its host pads with its input (padding_mode={mode!r}) and it pads with zeros"
        )


def _is_identity(matrix: Tensor) -> bool:
    if matrix.ndim == 1:
        return bool((matrix == 1).all())
    return torch.equal(matrix, torch.eye(len(matrix)).to(matrix))


def _check_affine(norm: nn.Module, what: str) -> None:
    if not {"weight", "bias"} <= affine_of(norm).keys():
        raise VisadaptError(f"the {what} cannot be merged: the norm there has no weight or no bias to write into")
