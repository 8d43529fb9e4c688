"""The catalogue: contenders by name, each with the recipe and the learning rates that are tried for it."""

from __future__ import annotations

import ast
from typing import Any

from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.contender import Contender
from visadapt.methods import METHODS, Biases, Full, Linear, Method, Norms, TopLayers
from visadapt.training import Recipe

_SPOKEN = {
    "linear probe": "Linear",
    "norms only": "Norms",
    "full fine-tuning": "Full",
    "top layers": "TopLayers",
    "conv-adapter": "ConvAdapter",
}
_METHODS = {**{name.lower(): cls for name, cls in METHODS.items()}, **{k: METHODS[v] for k, v in _SPOKEN.items()}}

# new parts move fast, pretrained weights slowly, and beside these a new head wants its own rate
_NEW, _OWN = (3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4)


def contender(name: str, modality: str = "image", epochs: int | None = None) -> Contender:
    """A contender of the catalogue.

    Args:
        name: a method's, then its options: ``bottleneck m=8``, ``lora r=4``, ``parallel``, ``linear probe``,
            ``norms only``, ``biases``, ``top layers n=2``, ``full fine-tuning``.
        modality: ``image`` or ``text``.
        epochs: of the training; None for the catalogue's: 3, and 30 of a linear probe, whose features are kept.

    Raises:
        VisadaptError: there is no such method or option.
    """
    words = name.split()
    options = [word for word in words if "=" in word]
    method = _method(" ".join(word for word in words if "=" not in word), options)
    probe, own = isinstance(method, Linear), isinstance(method, Full | TopLayers)
    recipe = Recipe(epochs=30 if probe else epochs or 3, lr=1e-4 if own else 1e-3, head_lr=1e-3 if own else None)
    rates = _OWN if own else tuple(3 * rate for rate in _NEW) if isinstance(method, Norms | Biases) else _NEW
    # what a method owns is what is counted: the top layers alone, a bias of every norm but not its gain
    norms = "frozen" if isinstance(method, Linear | TopLayers | Biases) else "affine"
    return Contender(name, method, recipe, norms, rates=rates)


def _method(word: str, options: list[str]) -> Method:
    if word.lower() not in _METHODS:
        raise VisadaptError(f"no method {word!r}{nearest(word.lower(), _METHODS)}")
    cls = _METHODS[word.lower()]
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in cls.__dataclass_fields__:
            raise VisadaptError(f"{cls.__name__} has no option {key!r}{nearest(key, cls.__dataclass_fields__)}")
        try:
            given[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            given[key] = value
    return cls(**given)
