"""The heads of all other models: the layers that make the output, as one forward on fake tensors shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from visadapt.backbone.dataflow import Flow, Value
from visadapt.backbone.heads.head import Final, Head, is_final, width_of
from visadapt.backbone.modules import own_parameters
from visadapt.backbone.trace import trace_flow
from visadapt.errors import VisadaptError


def traced_head(model: nn.Module, modules: Mapping[str, nn.Module], example: Any = None) -> Head:
    """The head of a model that runs on an example.

    Args:
        model: the backbone.
        modules: its modules by path.
        example: an input, as `visadapt.sites` takes it; guessed if None.

    Returns:
        The head, with no modules if there is none.

    Raises:
        VisadaptError: the model does not run on the example, or on any input that can be guessed.
    """
    flow, given = trace_flow(model, example)
    return with_auxiliary(head_of_flow(flow, modules), flow, model, modules, given)


def with_auxiliary(head: Head, flow: Flow, model: nn.Module, modules: Mapping[str, nn.Module], given: Any) -> Head:
    """The head with the layers that give logits in train mode only.

    The model is run in train mode only if it has layers as wide as the head that a forward in eval mode never reached.

    Args:
        head: as the forward in eval mode shows it.
        flow: that forward.
        model: the backbone.
        modules: its modules by path.
        given: the input of that forward.
    """
    reached = flow.read | {call.path for call in flow.calls}
    width = head.width(modules) if head.finals else None
    hidden = [p for p, m in modules.items() if p not in reached and is_final(m) and width_of(m) == width]
    if not hidden or head.obstacle:
        return head
    names, finals = ", ".join(hidden), list(head.finals)
    unknown = f"it does not use {names}, of the same width, in eval mode; if train mode does, name all with head="
    try:
        trained, _ = trace_flow(model, given, training=True)
    except VisadaptError:
        return replace(head, obstacle=unknown)
    used = trained.read | {call.path for call in trained.calls}
    layers = [_layers(trained, value, modules) for value in trained.outputs]
    finals += [Final(path) for path in hidden if any(path in own for own in layers)]
    if used & set(hidden) and finals == list(head.finals):
        # it may be in a loss, or behind a layer that mixes its classes
        return replace(head, obstacle=unknown)
    return replace(head, modules=tuple(final.path for final in finals), finals=tuple(finals))


def head_of_flow(flow: Flow, modules: Mapping[str, nn.Module]) -> Head:
    """The head that a recorded forward shows.

    An output has a head if all of it was computed from layers behind which nothing with parameters comes, and which
    feed nothing else. In a residual stream the last block's layer adds to what fed it, and is not a head.

    Args:
        flow: one forward of the whole model.
        modules: its modules by path.
    """
    outputs = [found for found in (_layers(flow, value, modules) for value in flow.outputs) if found]
    paths = tuple(dict.fromkeys(path for found in outputs for path in found))
    if not paths or {p for path in paths for p in own_parameters(modules[path])} == _all(modules):
        # a single layer is not a head on a backbone
        return Head(())
    several = len({frozenset(found) for found in outputs}) > 1
    widths = ", ".join(f"{path!r} of {width_of(modules[path])}" for path in paths)
    obstacle = f"it has several outputs with heads of their own ({widths}): say which, as head={paths[0]!r}"
    return Head(paths, tuple(Final(path) for path in paths), obstacle=obstacle if several else "")


def _all(modules: Mapping[str, nn.Module]) -> set[nn.Parameter]:
    return {p for module in modules.values() for p in module._parameters.values() if p is not None}


def _layers(flow: Flow, output: Value, modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers that an output was computed from with nothing that has parameters behind them; none if not all is."""
    found: dict[int, str] = {}
    layers = sum(1 << value.index for value in flow.values if value.weighed)
    waiting = [output]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if value.index in seen:
            continue
        seen.add(value.index)
        if value.weighed:
            path = next((path for path, passes in value.made_by if not passes), "")
            if not is_final(modules.get(path)):
                return []
            found[value.index] = path
        elif not value.ancestors & layers and value.shape == output.shape:
            # an image that is added to what was made of it; a mask or a scale among the inputs is ignored
            return []
        waiting += [] if value.weighed else [flow.values[i] for i in value.parents]
    made = sum(1 << index for index in found)
    if any(value.weighed and value.ancestors & made for value in flow.values):
        return []
    return list(dict.fromkeys(found[index] for index in sorted(found)))
