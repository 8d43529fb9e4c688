"""Vision Transformers of timm (ViT, DeiT, BEiT, EVA, Swin) and torchvision: pre-norm blocks on sequences of tokens."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from visadapt.backbone.families.attention import projections
from visadapt.backbone.families.block import blocks
from visadapt.backbone.site import Site

_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}

_LINEAR_ATTENTION = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``attention`` and ``mlp``: after the LayerScale if there is one, before drop-path and the add."""
    found: list[Site] = []
    for block, module, ends in blocks(modules, partial(_ends, model)):
        width = _width(model, module)
        for kind, (end, adapted, last) in ends.items():
            linear = (block.inner(last),) if last else ()
            found.append(block.site(block.inner(end), kind, width, "NLC", module.get_submodule(adapted), linear))
        # with separate query and value biases, BEiT and EVA may use the projection's weight without calling it
        separate = getattr(module._modules.get("attn"), "q_bias", None) is not None
        found += projections(block, {block.inner("attn.qkv")} if separate else ())
    return found


def _ends(model: nn.Module, block: nn.Module) -> dict[str, tuple[str, str, str]]:
    return (_timm(block) or _torchvision(block)) if _width(model, block) else {}


def _width(model: nn.Module, block: nn.Module) -> int:
    """Width of the tokens, if position embeddings or windows show that the block sees sequences."""
    norm = block._modules.get("norm1", block._modules.get("ln_1"))
    shape: tuple[int, ...] = getattr(norm, "normalized_shape", ())
    if len(shape) != 1:
        return 0
    width = int(shape[0])
    if hasattr(block, "window_size") and hasattr(block, "shift_size"):
        return width
    holders = (model, *model._modules.values())
    positions = [getattr(m, name, None) for m in holders for name in ("pos_embed", "pos_embedding", "cls_token")]
    return width if any(tuple(p.shape[2:]) == (width,) for p in positions if isinstance(p, Tensor)) else 0


def _timm(block: nn.Module) -> dict[str, tuple[str, str, str]]:
    names = [name for name, child in block._modules.items() if child is not None]
    if not {"norm1", "attn", "norm2", "mlp"} <= set(names) <= _BLOCK or names.index("attn") < names.index("norm1"):
        return {}
    attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    inner = set(attention._modules) - {"softmax", "rope", "inner_attn_ln"}
    if not {"proj"} <= inner <= _LINEAR_ATTENTION or not isinstance(attention._modules["proj"], nn.Linear):
        return {}
    if not isinstance(mlp._modules.get("fc2"), nn.Linear):
        return {}
    ends = {}
    for kind, number, name, last in (("attention", "1", "attn", "proj"), ("mlp", "2", "mlp", "fc2")):
        scale = block._modules.get(f"ls{number}")
        if isinstance(getattr(block, f"gamma_{number}", None), nn.Parameter):
            # LayerScale as a bare parameter: the output of the drop-path behind it is the scaled branch
            ends[kind] = (f"drop_path{number}", name, "")
        elif scale is not None and not isinstance(scale, nn.Identity):
            ends[kind] = (f"ls{number}", name, "")
        else:
            ends[kind] = (name, name, f"{name}.{last}")
    return ends


def _torchvision(block: nn.Module) -> dict[str, tuple[str, str, str]]:
    names = block._modules
    if not isinstance(names.get("self_attention"), nn.MultiheadAttention) or "ln_2" not in names:
        return {}
    mlp = names.get("mlp")
    if not isinstance(mlp, nn.Sequential):
        return {}
    # the last layer is the host, since a Sequential may be iterated over
    last = [name for name, layer in mlp.named_children() if isinstance(layer, nn.Linear)][-1]
    return {"attention": ("self_attention", "self_attention", ""), "mlp": (f"mlp.{last}", "mlp", f"mlp.{last}")}
