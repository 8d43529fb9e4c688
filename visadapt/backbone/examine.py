"""The two small forwards that find which rows belong to which sample; see `visadapt.backbone.rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from visadapt.backbone.batch import ITEMS, Axis, Key, children, is_cache, is_opaque, leaves, mapped, take
from visadapt.backbone.cuts import possible_cuts, size_of
from visadapt.backbone.entry import WHOLE, Entry
from visadapt.backbone.modules import ancestors, own_modules, unwrapped
from visadapt.backbone.read_first import reads_first
from visadapt.backbone.reordering import Watch, chose_rows
from visadapt.backbone.rows import FREE, UNKNOWN, Fact, Lying, Print, RowFacts, both_hosts, fact_of, merged, order_of
from visadapt.backbone.state import Label, State
from visadapt.backbone.twin import examining, twin_of
from visadapt.errors import VisadaptError


class RelatedError(VisadaptError):
    """A model compares the samples of a batch with each other."""


def examine(
    model: nn.Module,
    given: tuple[Any, Any],
    samples: int,
    classes: int | None = None,
    entry: Entry = WHOLE,
    shown: int | None = None,
) -> RowFacts:
    """Find the row facts of a batch.

    Args:
        model: the backbone, injected or not; neither it nor the batch is changed.
        given: ``(args, kwargs)`` of its call.
        samples: N, the expected number of samples.
        classes: number of classes of the backbone's own head; larger labels in the batch are clamped.
        entry: the method that is called with the batch.
        shown: how many samples the larger of the two compared batches has; N if None.

    Raises:
        VisadaptError: the batch cannot be split into N samples, or the output for one sample depends on the others.
    """
    cuts = list(possible_cuts(given, samples))
    if not cuts:
        raise VisadaptError(f"{samples} tasks were named for a batch of {size_of(given)}: name one per sample")
    opaque = next((leaf for _, leaf in leaves(given) if is_opaque(leaf) and not is_cache(leaf)), None)
    if opaque is not None:
        raise VisadaptError(
            f"a batch of mixed tasks must be made of tensors, lists, mappings and dataclasses, got a "
            f"{type(opaque).__name__}, which cannot be taken apart into samples"
        )
    if any(isinstance(leaf, Tensor) and _has_no_values(leaf) for _, leaf in leaves(given)):
        raise VisadaptError(
            "which rows belong to which sample is found by values, which a batch on the meta device or inside "
            "torch.vmap does not have: run one task at a time"
        )
    if any(_is_sharded(module) for module in own_modules(unwrapped(model)).values()):
        raise VisadaptError(
            "which rows belong to which sample is found on a copy of the model, and FSDP2 lets no sharded model be "
            "copied: run a mixed batch of each size, in the same mode, before fully_shard, or run one task at a time"
        )
    given = mapped(lambda key, leaf: _within(key, leaf, classes), given)
    why = ""
    for cut in cuts:
        try:
            found = _attempted(model, given, cut, samples, entry, shown)
        except RelatedError as error:
            found = str(error)
            if cut == cuts[0]:
                # a batch split in another way can look right where samples are compared with each other
                why = found
                break
        if isinstance(found, RowFacts) and entry != WHOLE:
            found = _unambiguous(model, given, found, samples, entry)
        if isinstance(found, RowFacts):
            return found
        why = why or found
    raise VisadaptError(
        f"{samples} tasks were named for a batch that {entry.shown(unwrapped(model))} does not treat as {samples} "
        f"samples independent of each other ({why})"
        f"{_samples_seen(model, given, samples, entry)}: name one task per sample, or run one task at a time"
    )


def _samples_seen(model: nn.Module, given: Any, named: int, entry: Entry) -> str:
    """Return the end of a message: how many samples a model sees, if that is the first axis of its first tensor."""
    size = size_of(given)
    cuts = possible_cuts(given, size) if isinstance(size, int) and size > 1 and size != named else ()
    try:
        fits = any(isinstance(_attempted(model, given, cut, size, entry), RowFacts) for cut in cuts)
    except RelatedError:
        fits = False
    return f"; it treats it as {size} samples" if fits else ""


@torch.inference_mode(False)
@torch.no_grad()
def _attempted(
    model: nn.Module, given: Any, cut: dict[Key, Axis], samples: int, entry: Entry, shown: int | None = None
) -> RowFacts | str:
    """Return the facts of a batch split at ``cut``, or the reason why it cannot be split there."""
    try:
        return _examined(model, given, cut, samples, entry, shown)
    except RelatedError:
        raise
    except VisadaptError as error:
        return str(error)
    except Exception as error:  # a model may raise anything if the batch was split along the wrong axis
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    args, kwargs = given
    labels = [name for name, value in kwargs.items() if isinstance(value, Tensor) and _is_label(name)]
    if not labels:
        return failure
    # labels of other tasks need not fit the backbone's own loss: try without them
    rest = {name: value for name, value in kwargs.items() if name not in labels}
    own = {key: axis for key, axis in cut.items() if key not in {(1, name) for name in labels}}
    found = _attempted(model, (args, rest), own, samples, entry, shown)
    return replace(found, cut=cut) if isinstance(found, RowFacts) else failure


def _unambiguous(model: nn.Module, given: Any, found: RowFacts, samples: int, entry: Entry) -> RowFacts | str:
    """Return the facts of a batch of a part of a model, or why another axis may be the batch axis just as well.

    A whole model has its samples along the first axis, or depends on the order along every other axis. A layer that
    acts on each token alone treats samples and tokens alike: then the samples must lie along the first axis, and a
    batch with as many tokens as samples is refused.
    """
    for key, leaf in leaves(given):
        axis = found.cut.get(key)
        if not isinstance(leaf, Tensor) or not isinstance(axis, int):
            continue
        other = 0 if axis else 1
        if axis or (leaf.ndim == 3 and leaf.shape[1] == samples):
            size = leaf.shape[other]
            try:
                elsewhere = _attempted(model, given, {**found.cut, key: other}, size, entry) if size > 1 else ""
            except RelatedError:
                continue
            if isinstance(elsewhere, RowFacts):
                return f"samples may lie along axis {axis} or {other} of a tensor of shape {tuple(leaf.shape)}"
    return found


def _is_label(name: Any) -> bool:
    return isinstance(name, str) and ("label" in name or "target" in name)


def _is_sharded(module: nn.Module) -> bool:
    """Return whether a module is sharded by FSDP2, whose class need not be imported for that."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or torch._C._functorch.is_batchedtensor(tensor)


def _within(key: Key, leaf: Any, classes: int | None) -> Any:
    """Clamp labels to the classes of the backbone's own head, which may be narrower than the task's."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
        return leaf
    if any(map(_is_label, key)):
        return leaf.clamp_max(0)
    return leaf.clamp_max(max(classes - 1, 0)) if classes is not None and leaf.ndim == 1 else leaf


def _examined(
    model: nn.Module, given: Any, cut: dict[Key, Axis], samples: int, entry: Entry, shown: int | None
) -> RowFacts:
    twin = twin_of(unwrapped(model))
    pair, order = take(given, cut, _distinct(given, cut, samples)), order_of(shown or samples)
    facts = _compared(twin, pair, cut, entry, order)
    if samples == 3 and facts.evidence:
        # a swap of two of three samples changes one of the two orders only
        other = _compared(twin_of(unwrapped(model)), take(pair, cut, (0, 1)), cut, entry, (1, 0, 1))
        hosts = {path: both_hosts(facts.hosts[path], other.hosts[path]) for path in facts.hosts if path in other.hosts}
        facts = replace(facts, hosts=hosts, reordered=facts.reordered or other.reordered)
    if not facts.evidence and samples > 1:
        try:
            varied = _compared(twin_of(unwrapped(model)), _varied(pair, cut), cut, entry, order)
        except Exception:  # the model may refuse made-up values; which then show nothing
            return facts
        return varied
    return facts


def _distinct(given: Any, cut: dict[Key, Axis], samples: int) -> tuple[int, int]:
    """Return the indices of two samples that differ, if any do."""
    for other in range(1, samples):
        for key, leaf in leaves(given, lambda key, _: cut.get(key) == ITEMS):
            axis = cut.get(key)
            if isinstance(leaf, Tensor) and axis is not None:
                one, two = leaf.select(int(axis), 0), leaf.select(int(axis), other)
                if not torch.equal(one, two):
                    return 0, other
            elif axis == ITEMS and leaf[0] is not leaf[other]:
                return 0, other
    return 0, min(1, samples - 1)


def _varied(pair: Any, cut: dict[Key, Axis]) -> Any:
    """Return the batch with its second sample changed: noise for floats; integers reversed, and the last one less."""

    def other(key: Key, leaf: Any) -> Any:
        axis = cut.get(key)
        if not isinstance(leaf, Tensor) or axis is None:
            return leaf
        changed = leaf.clone()
        second = changed.select(int(axis), 1)
        if leaf.is_floating_point():
            noise = torch.randn(second.shape, generator=torch.Generator().manual_seed(0)).to(second)
            second.copy_(second.mean() + noise * (second.std(correction=0) + 1e-3))
        elif second.numel():
            last = second if second.ndim == 0 else second[..., -1]
            last.copy_((last.long() - 1).clamp_min(0).to(last.dtype))
            if second.ndim and second.shape[-1] > 2:
                second[..., :-1] = second[..., :-1].flip(-1)
        return changed

    return mapped(other, pair, lambda key, _: cut.get(key) == ITEMS)


class _Recorder:
    """Records prints of the inputs and outputs of every module."""

    def __init__(self, twin: nn.Module) -> None:
        self.calls: dict[str, list[tuple[dict[Key, Any], dict[Key, Any]]]] = {}
        self.writers: set[str] = set()
        # attributes that a module's own call set to something with tensors in it
        self.stored: set[Label] = set()
        for path, module in own_modules(twin).items():
            if not isinstance(module, torch.jit.ScriptModule):
                # replaces forward instead of adding a hook: code that calls .forward directly skips hooks
                module.forward = self._around(path, module, module.forward)  # type: ignore[method-assign]

    def _around(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls = self.calls.setdefault(path, [])
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                inputs = _prints((args, kwargs))
            given = [(leaf, _version(leaf)) for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            held = dict(module.__dict__)
            out = forward(*args, **kwargs)
            for name, value in module.__dict__.items():
                if held.get(name, held) is not value and _has_tensors(value):
                    self.stored.add((path, name))
            if any(_version(leaf) != version for leaf, version in given):
                self.writers.add(path)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                calls.append((inputs, _prints(out)))
            return out

        return recorded


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in leaves(value))


def _version(tensor: Tensor) -> int:
    """Torch's count of the changes of a tensor in place; inference mode, which counts none, is off here."""
    return 0 if tensor.is_inference() else tensor._version


_ENOUGH = 4096
"""Numbers of each row by which the rows at a module are compared."""


def _prints(tree: Any) -> dict[Key, Print]:
    return {key: Print.of(leaf, _ENOUGH) for key, leaf in leaves(tree) if isinstance(leaf, Tensor)}


def _compared(twin: nn.Module, pair: Any, cut: dict[Key, Axis], entry: Entry, order: Sequence[int]) -> RowFacts:
    """Run the twin on (p, q) and on N samples of these, and compare the results."""
    modules = own_modules(twin)
    recorder = _Recorder(twin)
    states, again = [State(modules)], take(pair, cut, (0, 1))

    def run(given: Any) -> tuple[dict[str, Any], Any, Watch]:
        args, kwargs = given
        recorder.calls = {}
        watch = Watch((args, kwargs), twin.modules())
        with examining(twin), watch:
            out = entry.of(twin)(*args, **kwargs)
        states.append(State(modules))
        return recorder.calls, out, watch

    larger = take(pair, cut, order)
    few, small, first = run(pair)
    more, large, second = run(larger)
    if recorder.stored:
        with reads_first(modules, recorder.stored, each_call=True) as keeping:
            run(again)
        recorder.writers |= {path for keeper, _ in keeping for path in (keeper, *ancestors(keeper)[1:])}
    hosts = {}
    for path in few.keys() | more.keys():
        one, other = few.get(path, []), more.get(path, [])
        if len(one) == len(other):
            hosts[path] = merged(zip(one, other, strict=True), order, path in recorder.writers)
    outputs = _outputs(small, large, order)
    told = [fact for fact in outputs.values() if isinstance(fact, Lying)]
    if not told:
        raise VisadaptError("no part of its output has samples of its own")
    moving = states[0].changes(states[1]) | states[1].changes(states[2])
    kept = ""
    if moving:
        with reads_first(modules, moving) as steering:
            run(again)
        held = {label: modules[label[0]].__dict__.get(label[1]) for label in steering if label[0] in modules}
        held = {label: value for label, value in held.items() if _has_tensors(value)}
        kept = min(map(".".join, held), default="") if held and _continues(modules, held, lambda: run(again)[1]) else ""
        # the others follow from the input alone
        moving -= steering
    evidence = _evidence(small, outputs)
    return RowFacts(cut, outputs, hosts, chose_rows(first, second), evidence, frozenset(moving), kept)


def _continues(modules: Mapping[str, nn.Module], held: Mapping[Label, Any], forward: Callable[[], Any]) -> bool:
    """Return whether the values of tensors that a forward left behind change what the next one gives."""

    def left(changed: bool) -> Any:
        for (path, name), value in held.items():
            copied = mapped(lambda _, leaf: _other_values(leaf, changed) if isinstance(leaf, Tensor) else leaf, value)
            modules[path].__dict__[name] = copied
        return forward()

    try:
        return not _close(left(False), left(True))
    except Exception:  # values that the model cannot have
        return True


def _other_values(tensor: Tensor, changed: bool) -> Tensor:
    return tensor.clone() if not changed else tensor + 1 if tensor.dtype != torch.bool else ~tensor


def _outputs(small: Any, large: Any, order: Sequence[int], key: Key = ()) -> dict[Key, Fact]:
    """Return the facts of the model's output.

    Raises:
        VisadaptError: a part of the output grows with the batch, but its rows are not those of single samples.
    """
    if isinstance(small, tuple | list) and isinstance(large, tuple | list) and len(small) != len(large):
        if (len(small), len(large)) != (2, len(order)) or not all(map(_close, large, [small[i] for i in order])):
            raise VisadaptError("a list in its output is not one of samples")
        return {key: Lying(ITEMS)}
    if isinstance(small, Tensor) and isinstance(large, Tensor):
        fact = fact_of(small, large, order=order)
        grown = small.shape != large.shape
        if fact == UNKNOWN and grown and small.ndim == large.ndim:
            if sum(p != q for p, q in zip(small.shape, large.shape, strict=True)) > 1:
                name = ".".join(map(str, key)) or "its output"
                raise RelatedError(
                    f"{name} has several axes of samples, {tuple(small.shape)} for two: it compares samples, of which "
                    "each has its own task"
                )
            raise VisadaptError("the output for one sample depends on the others")
        return {key: fact}
    inner = dict(children(small) or ()), dict(children(large) or ())
    found: dict[Key, Fact] = {}
    for step in inner[0].keys() | inner[1].keys():
        if step not in inner[0] or step not in inner[1]:
            raise VisadaptError("its output is of another structure for each batch")
        found |= _outputs(inner[0][step], inner[1][step], order, (*key, step))
    return found


def _close(one: Any, other: Any) -> bool:
    left, right = dict(leaves(one)), dict(leaves(other))
    return left.keys() == right.keys() and all(
        fact_of(left[key], right[key]) == FREE
        for key in left
        if isinstance(left[key], Tensor) and isinstance(right[key], Tensor)
    )


def _evidence(small: Any, outputs: dict[Key, Fact]) -> bool:
    """Return whether the outputs of the two samples differ."""
    for key, leaf in leaves(small, lambda key, _: key in outputs and outputs[key] == Lying(ITEMS)):
        fact = outputs.get(key)
        if not isinstance(fact, Lying):
            continue
        if fact.axis == ITEMS:
            if not _close(leaf[0], leaf[1]):
                return True
            continue
        rows = Print.of(leaf.movedim(int(fact.axis), 0))
        groups = (
            rows.rows.view(fact.repeat, 2, -1).transpose(0, 1) if fact.tiled else rows.rows.view(2, fact.repeat, -1)
        )
        if float((groups[0] - groups[1]).abs().max()) > 4 * rows.tolerance * float(rows.rows.abs().max()):
            return True
    return False
