"""Any other backbone: sites at the ends of its branches, as one forward on fake tensors shows them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from visadapt.backbone.branches import End, ends
from visadapt.backbone.dataflow import Flow, Value
from visadapt.backbone.families.attention import projections
from visadapt.backbone.families.block import Block
from visadapt.backbone.families.convs import conv3x3, is_batchnorm
from visadapt.backbone.heads import Head, head_of_flow, with_auxiliary
from visadapt.backbone.modules import is_matrix, last_name, own_modules, parameter_count, parent, within
from visadapt.backbone.operators import is_operator
from visadapt.backbone.site import LeftOut, Site, Sites, layout_named
from visadapt.backbone.trace import trace_flow, unknown_axis
from visadapt.errors import VisadaptError

_ATTENTION = re.compile(r"attn|attention|mha|msa|xca|crpe", re.IGNORECASE)

_MLP = re.compile(r"mlp|ffn|feed_?forward|glu|channel_mix", re.IGNORECASE)


def find(model: nn.Module, modules: dict[str, nn.Module], head: Head | None, example: Any = None) -> tuple[Sites, Head]:
    """``block``, ``attention`` and ``mlp``: the ends of branches; ``conv3x3``: the 3×3 convs of their blocks.

    ``query``, ``value`` and ``qkv``: the projections of attention in them.

    Returns:
        The sites, and the head as the same forward shows it.

    Raises:
        VisadaptError: the model does not run on ``example``, or on any input that can be guessed.
    """
    flow, given = trace_flow(model, example)
    seen = head_of_flow(flow, modules)
    if head is None:
        seen = with_auxiliary(seen, flow, model, modules, given)
    found = ends(flow, modules, (seen if head is None else head).modules)
    counts = Counter(end.block for end in found)
    depths: dict[str, int] = {}
    sites: list[Site] = []
    left_out: list[LeftOut] = []
    for end in found:
        layout = layout_named(end.axis, len(end.value.shape))
        kind = kind_of(end, modules, alone=counts[end.block] == 1)
        if layout is None or end.axis is None:
            left_out.append(LeftOut(kind, unknown_axis(end.host, end.value.shape, end.value)))
            continue
        depth = depths.setdefault(end.block, len(depths))
        sites.append(
            Site(
                end.host,
                kind,
                end.value.shape[end.axis],
                layout,
                depth,
                stage=parent(end.block),
                block=end.block,
                adapts=sum(parameter_count(modules[path]) for path in end.branch),
                linear=_linear(end.value, flow, modules),
                traced=True,
            )
        )
    if left_out and not sites:
        raise VisadaptError(left_out[0].reason)
    called = flow.calls_of()
    used = called.keys() | flow.read
    for block, depth in depths.items():
        own = {p: m for p, m in modules.items() if p in used and block_of(p, depths) == block}
        inside = Block(block, depth, {p: m for p, m in own.items() if p in called}, traced=True)
        sites += conv3x3(inside) + projections(replace(inside, modules=own), used - called.keys())
    found_sites = Sites(sorted(sites, key=lambda site: site.depth))
    found_sites.left_out = tuple(left_out)
    return found_sites, seen


def block_of(path: str, blocks: Iterable[str]) -> str | None:
    """The innermost of some blocks that a module is in."""
    return max((block for block in blocks if not block or within(path, [block])), key=len, default=None)


def _linear(value: Value, flow: Flow, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """The conv or linear, and the BatchNorm behind it, whose composition the value is."""
    path = next((path for path, passes in value.made_by if not passes), "")
    module = modules[path] if path else None
    if module is not None and is_operator(module):
        return (path,)
    if module is not None and is_batchnorm(module) and len(value.parents) == 1:
        before = _linear(flow.values[value.parents[0]], flow, modules)
        return (*before, path) if len(before) == 1 else ()
    return ()


def kind_of(end: End, modules: dict[str, nn.Module], alone: bool) -> str:
    """``attention`` or ``mlp`` if all modules of the branch that hold matrices have such a name, else ``block``.

    Args:
        end: of the branch.
        modules: the backbone's modules by path.
        alone: whether its block has no other branch; then the block's name counts as well.
    """
    heavy = [p for p in end.branch if any(map(is_matrix, own_modules(modules[p]).values()))]
    for kind, words in (("mlp", _MLP), ("attention", _ATTENTION)):
        if heavy and all(_named(p, words, modules) for p in heavy):
            return kind
    return "attention" if alone and end.block and _named(end.block, _ATTENTION, modules) else "block"


def _named(path: str, words: re.Pattern[str], modules: dict[str, nn.Module]) -> bool:
    return bool(words.search(last_name(path)) or words.search(type(modules[path]).__name__))
