"""The projections of attention that low-rank adapters stand beside: ``query``, ``value``, and ``qkv`` where fused."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from visadapt.backbone.families.block import Block
from visadapt.backbone.modules import last_name
from visadapt.backbone.operators import CONVS, operator_of
from visadapt.backbone.site import WEIGHT, Site

_KINDS = {
    "query": ("query", "q_lin", "q_proj", "to_q", "q"),
    "value": ("value", "v_lin", "v_proj", "to_v", "v"),
    "qkv": ("qkv", "qkv_proj", "query_key_value", "to_qkv", "Wqkv", "in_proj", "c_attn", "kv"),
}

_NAMES = {name: kind for kind, names in _KINDS.items() for name in names}


def projections(block: Block, read: Collection[str] = ()) -> list[Site]:
    """Return the linears (or convolutions) of a block that make query, value, or these and the key at once.

    Args:
        block: the block.
        read: paths of modules whose weights other code computes with, without calling them.
    """
    found = []
    for path, module in block.modules.items():
        kind = _NAMES.get(last_name(path))
        if kind is None:
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, CONVS):
            operator = operator_of(module, path)
            channels, layout = operator.outputs, operator.layout
        elif weight is not None and weight.ndim == 2:
            # GPT-2 stores its weights transposed
            channels, layout = int(weight.shape[0 if isinstance(module, nn.Linear) else 1]), "NLC"
        else:
            continue
        found.append(block.site(path, WEIGHT if path in read else kind, channels, layout, module, (path,)))
    return found
