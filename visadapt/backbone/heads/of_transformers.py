"""The heads of transformers' models: what stands beside the base model, and the layers that follow ``num_labels``."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from visadapt.backbone.heads.head import Final, Head, is_final, last_layer, width_of
from visadapt.backbone.modules import CHILD, last_name, own_parameters, within
from visadapt.backbone.subclass import plain_class

_SPANS = "it answers with the start and the end of a span, whatever the number of classes: leave num_classes out"


def transformers_head(model: nn.Module, modules: Mapping[str, nn.Module]) -> Head | None:
    """The head of a transformers model.

    ``base_model_prefix`` names the base model, and what stands beside it is the head, but for the output embeddings of
    a language model, which answer over its vocabulary. A model that is its own base (``ViTModel``, ``CLIPModel``) has a
    head only if its class makes layers as wide as ``config.num_labels`` says (``CLIPForImageClassification``).

    Args:
        model: the backbone.
        modules: its modules by path.

    Returns:
        The head, with no modules if there is none; None if the model has no base and its class cannot be built to see
        which layers follow ``num_labels``.
    """
    children = {name: child for name, child in model._modules.items() if child is not None and name != CHILD}
    base = str(model.base_model_prefix)
    finals = _following_num_labels(model, modules)
    if base not in children and finals is None:
        return None
    embeddings = _output_embeddings(model, modules)
    if base in children:
        beside = [name for name in children if name != base]
    else:
        beside = _beside_encoders(model, children) if finals else []
    beside = [n for n in beside if own_parameters(children[n]) and n != embeddings.partition(".")[0]]
    beside = [path for name in beside for path in _called(children[name], modules)]
    # a layer within the base follows num_labels alone: the base around it is not part of the head
    lone = [final.path for final in finals or () if not within(final.path, beside)]
    if not beside and not lone:
        obstacle = (
            f"its last layer, {embeddings}, answers over a vocabulary and not over classes; load the model as "
            "…ForSequenceClassification"
        )
        return Head((), obstacle=obstacle if embeddings else "")
    if finals == ():
        # …ForMultipleChoice has a head for a problem, …ModelWithProjection a pretrained one
        named = re.search("For[A-Z]|Heads", plain_class(model).__name__) is not None
        return Head(tuple(beside), (), named, f"no layer of {' and '.join(beside)} follows config.num_labels")
    obstacle = _SPANS if any(last_name(final.path) == "qa_outputs" for final in finals or ()) else ""
    return Head((*beside, *lone), finals or (), fresh=True, obstacle=obstacle)


def _called(module: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of a module, or of those that it holds where it is a list that is never called, as Deformable DETR has."""
    if plain_class(module).forward is nn.Module.forward:
        inside = [child for name, child in module._modules.items() if child is not None and name != CHILD]
        found = [path for child in inside if own_parameters(child) for path in _called(child, modules)]
        return list(dict.fromkeys(found))
    return [path for path, own in modules.items() if own is module]


def _output_embeddings(model: Any, modules: Mapping[str, nn.Module]) -> str:
    """Path of the layer that gives a language model's logits over its vocabulary; empty if there is none."""
    try:
        layer = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    return next((path for path, module in modules.items() if module is layer), "")


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _beside_encoders(model: Any, children: Mapping[str, nn.Module]) -> list[str]:
    """Children beside those that are pretrained models themselves, in a model that holds these without a prefix."""
    encoders = [name for name, child in children.items() if hasattr(child, "base_model_prefix")]
    embeddings = _input_embeddings(model)
    return [
        name
        for name, child in children.items()
        if encoders and name not in encoders and all(inner is not embeddings for inner in child.modules())
    ]


def _following_num_labels(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Final, ...] | None:
    """The layers whose width follows ``config.num_labels``: the model's class is built twice, without memory.

    Returns:
        The layers, and how their widths follow; None if the class cannot be built from the config alone.
    """
    config: Any = model.config
    count = getattr(config, "num_labels", None)
    if not isinstance(count, int) or count < 1:
        return ()
    try:
        more, most = _two_widths(plain_class(model), config, count)
    except Exception:
        # another's constructor: it may take more arguments, read files, or look at values
        return None
    std = getattr(config, "initializer_range", None)
    std = std if isinstance(std, float) and math.isfinite(std) else None
    finals = []
    for path, width in more.items():
        times = most.get(path, width) - width
        if not times:
            continue
        last = last_layer(path, modules)
        if last is None:
            # another module stands there by now
            return None
        finals.append(Final(last, times, width - times * (count + 1), std))
    return tuple(finals)


_BUILT: WeakKeyDictionary[type[nn.Module], tuple[str, tuple[dict[str, int], dict[str, int]]]] = WeakKeyDictionary()
"""What was last found of each class, and for which config: every inject and load into a new model asks for it."""


def _two_widths(cls: type[nn.Module], config: Any, count: int) -> tuple[dict[str, int], dict[str, int]]:
    """The widths for one label more than the config has, and for two more."""
    try:
        text = str(config.to_json_string(use_diff=False))
    except Exception:  # another's config may hold what JSON cannot say; then nothing is kept
        text = ""
    known = _BUILT.get(cls)
    if known is not None and text and known[0] == text:
        return known[1]
    found = _widths(cls, config, count + 1), _widths(cls, config, count + 2)
    _BUILT[cls] = text, found
    return found


def _widths(cls: type[nn.Module], config: Any, num_labels: int) -> dict[str, int]:
    """The widths of all linears and convolutions that a class makes for a number of labels."""
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built = cls(config)
    return {path: width_of(module) for path, module in built.named_modules() if is_final(module)}
