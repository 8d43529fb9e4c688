"""Load pretrained backbones by name, from every supported source."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from visadapt.data.pretrained import pretrained
from visadapt.data.tokenizers import minilm_path
from visadapt.data.weights import resnet50
from visadapt.errors import VisadaptError, nearest
from visadapt.optional import require
from visadapt.reading import check_readable


def resolve(source: Any, **build: Any) -> nn.Module:
    """Build a backbone from a builder or a name.

    Args:
        source: a function that returns a module, such as torchvision's ``resnet50``, or one of
            ``"timm/<name>"``, ``"torchvision/<name>"``, ``"hf/<name or folder>"``, ``"bundled/<name>"``.
        **build: passed to the builder or loader. Names load pretrained weights unless these say otherwise
            (``pretrained=False`` for timm, ``weights=None`` for torchvision).

    Returns:
        The module.

    Raises:
        VisadaptError: the source or the name is unknown (the nearest is named), or what it names cannot be loaded.
    """
    if isinstance(source, str):
        place, _, name = source.partition("/")
        if place not in PLACES or not name:
            raise VisadaptError(
                f"no backbone {source!r}{nearest(place, PLACES)} (names look like 'timm/resnet50.a1_in1k', "
                "'torchvision/vgg16', 'hf/bert-base-uncased' or 'bundled/resnet50')"
            )
        try:
            return PLACES[place](name, **build)
        except VisadaptError:
            raise
        except Exception as error:  # each library has its own errors for a missing network, file or option
            raise VisadaptError(f"cannot load {source!r}: {error}") from error
    if callable(source):
        return _built(source, getattr(source, "__name__", repr(source)), build)
    raise VisadaptError(f"model must be a module, a builder or a name, got {type(source).__name__}")


def _built(builder: Callable[..., Any], name: str, build: dict[str, Any]) -> nn.Module:
    try:
        model = builder(**build)
    except TypeError as error:
        if not any(repr(key) in str(error) for key in build):
            raise  # an error inside the builder
        raise VisadaptError(f"the builder {name!r} cannot be called: {error}") from error
    if not isinstance(model, nn.Module):
        raise VisadaptError(f"the builder {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _timm(name: str, **build: Any) -> nn.Module:
    timm = require("timm", f"'timm/{name}'", "timm")
    model_name = name.partition(".")[0]
    # "hf-hub:…" and "local-dir:…" are timm's own sources
    if ":" not in name and not timm.is_model(model_name):
        raise VisadaptError(f"no timm model {name!r}{nearest(model_name, timm.list_models())}")
    if name.startswith("local-dir:"):
        check_readable(name.partition(":")[2])
    model: nn.Module = timm.create_model(name, **{"pretrained": True, **build})
    return model


def _torchvision(name: str, **build: Any) -> nn.Module:
    models = require("torchvision.models", f"'torchvision/{name}'", "torchvision")
    if name not in models.list_models():
        raise VisadaptError(f"no torchvision model {name!r}{nearest(name, models.list_models())}")
    options = {"weights": "DEFAULT", **build}
    model: nn.Module = models.get_model(name, **options)
    if options["weights"] is not None and (published := _preprocessing(models, name, options["weights"])):
        model.pretrained_cfg = published  # type: ignore[assignment]
    return model


def _preprocessing(models: Any, name: str, weights: Any) -> dict[str, Any] | None:
    """What the publisher of torchvision's weights did to images, in timm's words."""
    known = models.get_model_weights(name)
    entry = known[weights.rpartition(".")[2]] if isinstance(weights, str) else weights
    preset = entry.transforms()
    if not all(hasattr(preset, each) for each in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        return None
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    crop_pct = crop / resize
    if math.floor(crop / crop_pct) != resize:
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "input_size": (3, crop, crop),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def _minilm(**build: Any) -> nn.Module:
    return pretrained(str(minilm_path()), **build)


def _bundled(name: str, **build: Any) -> nn.Module:
    builders: dict[str, Callable[..., nn.Module]] = {"resnet50": resnet50, "minilm": _minilm}
    if name not in builders:
        raise VisadaptError(f"no bundled backbone {name!r}{nearest(name, builders)}")
    return builders[name](**build)


WEIGHTLESS: dict[str, dict[str, Any]] = {"timm": {"pretrained": False}, "torchvision": {"weights": None}}
"""Options per source that build a network without downloading its weights."""

PLACES: dict[str, Callable[..., nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": pretrained,
    "bundled": _bundled,
}
