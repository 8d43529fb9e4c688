"""The map that a sequence of tokens was cut from, as the library of the backbone records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.modules import ancestors
from visadapt.backbone.site import Site

_FIRST = ("cls_token", "distillation_token", "register_tokens")


@dataclass(frozen=True)
class TokenGrid:
    """Where tokens lie on a map.

    Attributes:
        height: rows of the map.
        width: columns of the map.
        prefix: number of tokens before those of the map (class token, registers); None for all that remain.
    """

    height: int
    width: int
    prefix: int | None = 0


def token_grid(modules: Mapping[str, nn.Module], site: Site) -> TokenGrid | None:
    """The grid of the tokens at a site.

    Args:
        modules: the backbone's modules by path.
        site: one of token sequences.

    Returns:
        The grid that timm, torchvision or transformers records for the module that cuts the images; None if there is
        no such record.
    """
    for path in reversed(ancestors(site.host)):
        module = modules[path]
        if hasattr(module, "shift_size") and hasattr(module, "input_resolution"):
            # Swin: attention sees one window at a time, all else the whole map
            windows = modules[site.host] is module._modules.get("attn")
            return _grid(modules[site.host].window_size if windows else module.input_resolution, 0)
        found = _timm(module) or _torchvision(module) or _transformers(module)
        if found is not None:
            return found
    return None


def _grid(size: Any, prefix: int) -> TokenGrid | None:
    return TokenGrid(int(size[0]), int(size[1]), prefix) if isinstance(size, tuple | list) and len(size) == 2 else None


def _timm(model: nn.Module) -> TokenGrid | None:
    prefix = getattr(model, "num_prefix_tokens", None)
    return (
        _grid(getattr(getattr(model, "patch_embed", None), "grid_size", None), prefix) if prefix is not None else None
    )


def _torchvision(model: nn.Module) -> TokenGrid | None:
    size, patch = getattr(model, "image_size", None), getattr(model, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int) or not hasattr(model, "class_token"):
        return None
    return TokenGrid(size // patch, size // patch, 1)


def _transformers(model: nn.Module) -> TokenGrid | None:
    embeddings = model._modules.get("embeddings")
    patches = None if embeddings is None else embeddings._modules.get("patch_embeddings")
    size, patch = _pair(getattr(patches, "image_size", None)), _pair(getattr(patches, "patch_size", None))
    if embeddings is None or size is None or patch is None:
        return None
    tokens = [getattr(embeddings, name, None) for name in _FIRST]
    prefix = sum(token.shape[1] for token in tokens if isinstance(token, Tensor))
    grid = TokenGrid(size[0] // patch[0], size[1] // patch[1], prefix)
    positions = getattr(embeddings, "position_embeddings", None)
    if isinstance(positions, Tensor) and positions.shape[1] > prefix + grid.height * grid.width:
        # tokens that are neither of the map nor before it, such as those of YOLOS's detections
        return None
    return grid


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[1])) if isinstance(value, tuple | list) and len(value) == 2 else None
