"""Transformer encoders of transformers: BERT, RoBERTa, ELECTRA and similar, and DistilBERT."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.families.attention import projections
from visadapt.backbone.families.block import blocks
from visadapt.backbone.site import Site


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``attention`` and ``mlp``: after each sub-layer's output projection and dropout, before the add and LayerNorm.

    ``query`` and ``value``: the projections of these names.
    """
    found: list[Site] = []
    for block, layer, ends in blocks(modules, lambda m: _bert(m) or _distilbert(m)):
        for kind, (end, projection, adapted) in ends.items():
            channels = getattr(layer.get_submodule(projection), "out_features", None)
            if channels is not None:
                host, linear = block.inner(end), (block.inner(projection),)
                found.append(block.site(host, kind, channels, "NLC", layer.get_submodule(adapted), linear))
        found += projections(block)
    return found


def _has(module: nn.Module, *paths: str) -> bool:
    try:
        return all(module.get_submodule(path) is not None for path in paths)
    except AttributeError:
        return False


def _bert(layer: nn.Module) -> dict[str, tuple[str, str, str]]:
    if not _has(layer, "attention.output.dense", "attention.output.dropout", "output.dense", "output.dropout"):
        return {}
    return {
        "attention": ("attention.output.dropout", "attention.output.dense", "attention"),
        "mlp": ("output.dropout", "output.dense", "output"),
    }


def _distilbert(layer: nn.Module) -> dict[str, tuple[str, str, str]]:
    if not _has(layer, "attention.out_lin", "ffn.lin2", "sa_layer_norm"):
        return {}
    # the attention has no dropout after the projection; the FFN applies its own dropout, so the whole FFN is the host
    return {"attention": ("attention.out_lin", "attention.out_lin", "attention"), "mlp": ("ffn", "ffn.lin2", "ffn")}
