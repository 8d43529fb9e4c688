"""The heads of torchvision's, timm's and transformers' models, as these libraries name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from visadapt.backbone.heads.head import Final, Head, is_final, last_layer, width_of
from visadapt.backbone.heads.of_transformers import transformers_head
from visadapt.backbone.modules import own_modules, own_parameters
from visadapt.backbone.subclass import plain_class

NO_HEAD = Head(())
"""The head of a backbone that is known to have none."""


def find_head(model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> Head | None:
    """The head of a model whose library says where it is.

    Its answer counts only if the forward that runs is the library's own, or wraps it: a subclass with another forward
    may end in something else.

    Args:
        model: the backbone.
        modules: its modules by path, where they are known.

    Returns:
        The head, with no modules if the library says that there is none; None if no library names it.
    """
    modules = own_modules(model) if modules is None else modules
    given = model.__dict__.get("forward")
    if given is not None and not _wraps(given, plain_class(model).forward):
        return None
    if hasattr(model, "config") and hasattr(model, "base_model_prefix"):
        return transformers_head(model, modules)
    # None for a forward compiled from text, as torch.fx does
    library = plain_class(model).forward.__module__ or ""
    if library.startswith("timm."):
        return _timm(model, modules)
    if library.startswith("torchvision.models.detection."):
        return _detector(modules)
    if library.startswith("torchvision.models."):
        return _torchvision(modules)
    return None


def _wraps(forward: Any, own: Any) -> bool:
    """Whether a forward given to a module calls that of its class, as accelerate's hooks do."""
    while forward is not None and getattr(forward, "__func__", forward) is not own:
        forward = forward.__dict__.get("__wrapped__") if hasattr(forward, "__dict__") else None
    return forward is not None


def _timm(model: nn.Module, modules: Mapping[str, nn.Module]) -> Head | None:
    """The classifiers of a timm model, by name in its config or as modules."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    roots = (named,) if isinstance(named, str) else tuple(named)
    if not roots or not all(is_final(modules.get(path)) for path in roots):
        if not hasattr(model, "get_classifier"):
            # a list or dict of features
            return NO_HEAD
        try:
            given = model.get_classifier()  # type: ignore[operator]
        except AttributeError:
            # the head that it looks inside was taken out
            return None
        own = list(given) if isinstance(given, tuple | list | nn.ModuleList) else [given]
        roots = tuple(path for path, module in modules.items() if any(module is m for m in own))
    return _ending_in((*roots, *_auxiliary(modules)), modules)


def _torchvision(modules: Mapping[str, nn.Module]) -> Head | None:
    """The attribute that torchvision's forwards end in, and their auxiliary outputs."""
    low_and_high = ("classifier.low_classifier", "classifier.high_classifier")
    if all(path in modules for path in low_and_high):
        # LRASPP adds up the logits of two maps
        return _ending_in(low_and_high, modules)
    root = next((name for name in ("fc", "classifier", "head", "heads") if name in modules), None)
    if root is None:
        return NO_HEAD
    return _ending_in((root, *_auxiliary(modules)), modules)


def _auxiliary(modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that give torchvision's and timm's auxiliary outputs in train mode."""
    return [path for path in ("aux1.fc2", "aux2.fc2", "AuxLogits.fc", "aux_classifier") if path in modules]


def _ending_in(roots: tuple[str, ...], modules: Mapping[str, nn.Module]) -> Head | None:
    """The head that consists of the last layers of some modules."""
    trained = [path for path in roots if own_parameters(modules[path])]
    if not trained:
        # the library's way to leave the head out is an identity in its place
        return NO_HEAD
    finals = [last_layer(path, modules) for path in trained]
    if any(final is None for final in finals):
        return None
    paths = tuple(str(final) for final in finals)
    return Head(paths, tuple(Final(path) for path in paths))


CLASS_COUNTS = ("num_classes", "num_columns")
"""Attributes of a detector's head with the number of classes by which its forward reshapes the outputs."""

_PRIOR = -math.log((1 - 0.01) / 0.01)
"""Bias for a focal loss: at the start every anchor predicts an object with probability 0.01."""


def _detector(modules: Mapping[str, nn.Module]) -> Head | None:
    """The parts of torchvision's detectors that depend on the classes: not boxes, anchors and keypoints."""
    roots: list[str] = []
    finals: list[Final] = []
    for path, module in modules.items():
        kind = plain_class(module).__name__
        classes = next((module.__dict__[name] for name in CLASS_COUNTS if name in module.__dict__), 0)
        if kind == "FastRCNNPredictor":
            own = [Final(f"{path}.cls_score"), Final(f"{path}.bbox_pred", times=4)]
        elif kind == "MaskRCNNPredictor":
            own = [Final(f"{path}.mask_fcn_logits")]
        elif kind in ("RetinaNetClassificationHead", "FCOSClassificationHead"):
            anchors = width_of(modules[f"{path}.cls_logits"]) // classes
            own = [Final(f"{path}.cls_logits", anchors, std=0.01, bias=_PRIOR)]
        elif kind in ("SSDClassificationHead", "SSDLiteClassificationHead"):
            last = [last_layer(f"{path}.module_list.{i}", modules) for i in modules[f"{path}.module_list"]._modules]
            own = [Final(p, width_of(modules[p]) // classes, std=0.03) for p in last if p is not None]
        else:
            continue
        roots.append(path)
        finals += own
    if not roots:
        return NO_HEAD
    return Head(tuple(roots), tuple(finals))
