"""The catalogue: contenders by name, each with its recipe and the learning rates to try."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from typing import Any

from visadapt.arguments import takes
from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.contenders import Contender
from visadapt.methods import (
    METHODS,
    AdaptFormer,
    Biases,
    Bottleneck,
    ConvAdapter,
    Full,
    Ladder,
    Linear,
    Method,
    Mona,
    Norms,
    TopLayers,
)
from visadapt.training import Recipe

_LONG_NAMES = {"Linear": "linear probe", "Norms": "norms only", "Full": "full fine-tuning", "TopLayers": "top layers"}

# results identify a contender by its name: one canonical name per method, whichever alias it was requested by
_NAMES: dict[type[Method], str] = {cls: _LONG_NAMES.get(name, name.lower()) for name, cls in METHODS.items()}

_METHODS: dict[str, type[Method]] = {
    **{name.lower(): cls for name, cls in METHODS.items()},
    **{name: cls for cls, name in _NAMES.items()},
    "conv-adapter": ConvAdapter,
}

FULL = _NAMES[Full]
"""Name of the contender that trains all weights."""

_INJECTED = ("where", "norms")
"""What a name may say to `visadapt.inject` beside the method's own options, in the order of canonical names."""

_BASELINES = tuple(_NAMES[cls] for cls in (Linear, Norms, Biases, TopLayers, Full))

# Learning rates around the best ones of docs/cifar10-sweep.md and docs/tweets-sweep.md. Pretrained weights need low
# rates, and the new head beside them its own; gains and biases are few and tolerate high rates; bottlenecks tolerate
# higher rates than linear adapters.
_WEIGHTS, _LAYERS, _LINEAR = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)

_BOTTLENECK, _VECTORS, _HEAD = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def is_adapter(name: str) -> bool:
    """Whether the contender of this name adds modules, rather than training parameters of the network."""
    return not name.startswith(_BASELINES)


@takes()
def contender(name: str, epochs: int = 3, head_first: bool = True) -> Contender:
    """Build a contender of the catalogue; its recipe has the second of its learning rates.

    Args:
        name: a method and its options: ``bottleneck m=8``, ``lora r=4``, ``parallel``, ``linear probe``,
            ``norms only``, ``biases``, ``top layers n=2``, ``full fine-tuning``. Case, the order of the options and
            aliases such as ``full`` do not matter: the contender has the canonical name. ``where=`` and ``norms=`` go
            to `visadapt.inject`: ``lora r=10 where=conv``, ``bottleneck m=8 where=layer3,layer4 norms=full``.
        epochs: epochs of training, except for a linear probe, which trains for 30 epochs on cached features.
        head_first: whether a new head starts as the linear probe.

    Returns:
        The contender.

    Raises:
        VisadaptError: the method or an option does not exist, or an option has a wrong value.

    Examples:
        >>> from visadapt.experiments import contender
        >>> small = contender("Bottleneck m=8", epochs=2)
        >>> small.name, small.recipe.epochs, small.recipe.lr
        ('bottleneck m=8', 2, 0.003)
    """
    words = name.split()
    options = _options(word for word in words if "=" in word)
    injected = {name: options.pop(name) for name in _INJECTED if name in options}
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
        rates = _BOTTLENECK if isinstance(method, Bottleneck | AdaptFormer | ConvAdapter | Mona | Ladder) else _LINEAR
        recipe = Recipe(epochs=epochs, norm_lr=3e-3)
    # these methods train what their name says and nothing else: the top layers alone, a norm's bias but not its gain
    norms = "frozen" if isinstance(method, Linear | TopLayers | Biases) else method.norms
    given = [f"{field.name}={options[field.name]}" for field in dataclasses.fields(method) if field.name in options]
    canonical = " ".join((_NAMES[type(method)], *given, *(f"{name}={value}" for name, value in injected.items())))
    return Contender(
        canonical,
        method,
        recipe.replace(lr=rates[1], head_first=head_first),
        injected.get("norms", norms),
        _terms(injected.get("where")),
        rates,
    )


def _terms(where: Any) -> Any:
    return where.split(",") if isinstance(where, str) and "," in where else where


def _options(words: Iterable[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    return options


def _method(word: str, options: dict[str, Any]) -> Method:
    if word.lower() not in _METHODS:
        raise VisadaptError(f"no contender {word!r}{nearest(word.lower(), _METHODS)}")
    return _METHODS[word.lower()].of(options)
