"""Load pretrained backbones by name, from every supported source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from visadapt.data.tokenizers import minilm_path
from visadapt.data.weights import resnet50
from visadapt.errors import VisadaptError, nearest
from visadapt.optional import require


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
    model: nn.Module = timm.create_model(name, **{"pretrained": True, **build})
    return model


def _torchvision(name: str, **build: Any) -> nn.Module:
    models = require("torchvision.models", f"'torchvision/{name}'", "torchvision")
    if name not in models.list_models():
        raise VisadaptError(f"no torchvision model {name!r}{nearest(name, models.list_models())}")
    model: nn.Module = models.get_model(name, **{"weights": "DEFAULT", **build})
    return model


def _transformers(name: str, **build: Any) -> nn.Module:
    transformers = require("transformers", f"'hf/{name}'", "visadapt[text]")
    with _quiet(transformers.utils.logging):
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(name, **build)
    return model


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep transformers from warning that a new head is new, which is what it is for, and from drawing bars."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _minilm(**build: Any) -> nn.Module:
    return _transformers(str(minilm_path()), **build)


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
    "hf": _transformers,
    "bundled": _bundled,
}
