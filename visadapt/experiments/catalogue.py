"""The catalogue: contenders by name, each with the recipe and the learning rates that are tried for it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from typing import Any

from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.contenders import Contender
from visadapt.methods import (
    METHODS,
    AdaptFormer,
    Biases,
    Bottleneck,
    ConvAdapter,
    Full,
    Linear,
    Method,
    Norms,
    TopLayers,
)
from visadapt.training import Recipe

_SPOKEN = {"Linear": "linear probe", "Norms": "norms only", "Full": "full fine-tuning", "TopLayers": "top layers"}

# a contender is told by its name in results, so each method has one, however it was asked for
_NAMES: dict[type[Method], str] = {cls: _SPOKEN.get(name, name.lower()) for name, cls in METHODS.items()}

_METHODS: dict[str, type[Method]] = {
    **{name.lower(): cls for name, cls in METHODS.items()},
    **{name: cls for cls, name in _NAMES.items()},
    "conv-adapter": ConvAdapter,
}

# around what docs/cifar10-sweep.md and docs/tweets-sweep.md found: pretrained weights move slowly, and beside them a
# new head wants its own rate, the fewer of them the faster; gains and biases are few and move fast; a bottleneck bears
# more than what is linear
_WEIGHTS, _LAYERS, _LINEAR = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)

_BOTTLENECK, _VECTORS, _HEAD = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def contender(name: str, epochs: int = 3) -> Contender:
    """A contender of the catalogue; the second of its learning rates is its recipe's.

    Args:
        name: a method's, then its options: ``bottleneck m=8``, ``lora r=4``, ``parallel``, ``linear probe``,
            ``norms only``, ``biases``, ``top layers n=2``, ``full fine-tuning``. Case and the order of options do not
            matter, nor does a shorter name such as ``full``: the contender has the catalogue's.
        epochs: of the training, but for a linear probe, which has 30 on features that are kept.

    Raises:
        VisadaptError: there is no such method or option.
    """
    words = name.split()
    options = _options(word for word in words if "=" in word)
    method = _method(" ".join(word for word in words if "=" not in word), options)
    rates: tuple[float, ...]
    if isinstance(method, Linear):
        rates, recipe = _HEAD, Recipe(epochs=30)
    elif isinstance(method, Full | TopLayers):
        rates = _WEIGHTS if isinstance(method, Full) else _LAYERS
        recipe = Recipe(epochs=epochs, head_lr=1e-3)
    elif isinstance(method, Norms | Biases):
        rates, recipe = _VECTORS, Recipe(epochs=epochs)
    else:
        rates = _BOTTLENECK if isinstance(method, Bottleneck | AdaptFormer | ConvAdapter) else _LINEAR
        recipe = Recipe(epochs=epochs, norm_lr=3e-3)
    # what a method owns is what is counted: the top layers alone, a bias of every norm but not its gain
    norms = "frozen" if isinstance(method, Linear | TopLayers | Biases) else "affine"
    told = (f"{field.name}={options[field.name]}" for field in dataclasses.fields(method) if field.name in options)
    return Contender(" ".join((_NAMES[type(method)], *told)), method, recipe.replace(lr=rates[1]), norms, rates=rates)


def _options(words: Iterable[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            given[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            given[key] = value
    return given


def _method(word: str, options: dict[str, Any]) -> Method:
    if word.lower() not in _METHODS:
        raise VisadaptError(f"no method {word!r}{nearest(word.lower(), _METHODS)}")
    return _METHODS[word.lower()].of(options)
