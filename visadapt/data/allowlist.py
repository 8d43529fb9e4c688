"""What a file may ask of a loader: names without paths or addresses, and typed options of the architecture.

A task file may come from anyone. Everything that is not listed here (``trust_remote_code``, ``weights_only``,
``pretrained_cfg_overlay``, ``cache_dir``…) is refused; the user may give it on the command line instead.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A type of value with its bounds.

    Attributes:
        what: it is, to complete "must be …".
        holds: whether a JSON value is one.
    """

    what: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    return Kind(
        f"an integer from {low} to {high}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
    )


def real(low: float, high: float) -> Kind:
    def holds(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value) and low <= value <= high

    return Kind(f"a number from {low} to {high}", holds)


def _several(one: Kind) -> Kind:
    """One value, or a list with one value per stage or axis."""

    def holds(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return 1 <= len(value) <= 16 and all(one.holds(item) for item in value)
        return one.holds(value)

    return Kind(f"{one.what}, or a list of up to 16 of them", holds)


def _together(one: Kind, most: int) -> Kind:
    """One value, or a list of them, of at most ``most`` in total."""
    several = _several(one)

    def holds(value: Any) -> bool:
        return several.holds(value) and (sum(value) if isinstance(value, list | tuple) else value) <= most

    return Kind(f"{several.what}, {most} in total", holds)


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, choices))}", lambda v: isinstance(v, str) and v in choices)


FLAG = Kind("true or false", lambda v: isinstance(v, bool))
_WORD = Kind(
    "a word of letters, digits, '.', '_' and '-'",
    lambda v: isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", v) is not None,
)
_WORD_OR_NONE = Kind(f"null or {_WORD.what}", lambda v: v is None or _WORD.holds(v))
# each block takes time to be built even without memory; the deepest networks of timm have less than 200
MOST_BLOCKS = 256
_CLASSES, _COUNT, _DEPTH, SIDE = whole(0, 65536), whole(1, 65536), whole(1, MOST_BLOCKS), whole(1, 8192)
_RATE, _SCALE = real(0, 1), real(0, 100)
_SIDES, _COUNTS, _SCALES = map(_several, (SIDE, _COUNT, _SCALE))
_DEPTHS = _together(_DEPTH, MOST_BLOCKS)
_SIZE_KINDS = {_CLASSES, _COUNT, _DEPTH, SIDE, _SCALE, _SIDES, _COUNTS, _SCALES, _DEPTHS}

_TIMM: dict[str, Kind] = {
    **dict.fromkeys(("pretrained", "qkv_bias", "class_token", "no_embed_class", "pre_norm", "avg_down"), FLAG),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size"), FLAG),
    "num_classes": _CLASSES,
    **dict.fromkeys(("in_chans", "cardinality", "base_width", "stem_width", "output_stride"), _COUNT),
    **dict.fromkeys(("img_size", "patch_size", "window_size"), _SIDES),
    **dict.fromkeys(("channels", "dims", "embed_dim", "num_heads"), _COUNTS),
    **dict.fromkeys(("depth", "depths", "layers"), _DEPTHS),
    **dict.fromkeys(("mlp_ratio", "init_values", "ls_init_value"), _SCALES),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate"), _RATE),
    **dict.fromkeys(("pos_drop_rate", "patch_drop_rate", "head_drop_rate"), _RATE),
    "global_pool": _one_of("", "avg", "max", "avgmax", "catavgmax", "token", "map", "fast"),
}
_TORCHVISION: dict[str, Kind] = {
    "weights": _WORD_OR_NONE,
    **dict.fromkeys(("aux_logits", "transform_input", "init_weights", "progress", "zero_init_residual"), FLAG),
    "num_classes": _COUNT,
    "image_size": SIDE,
    **dict.fromkeys(("groups", "width_per_group"), _COUNT),
    **dict.fromkeys(("dropout", "attention_dropout", "stochastic_depth_prob"), _RATE),
    "width_mult": _SCALE,
}
_TRANSFORMERS: dict[str, Kind] = {
    "num_labels": _COUNT,
    "num_hidden_layers": _DEPTH,
    **dict.fromkeys(("image_size", "patch_size"), _SIDES),
    **dict.fromkeys(("num_channels", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), _RATE),
    **dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout", "drop_path_rate"), _RATE),
    "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification"),
    "attn_implementation": _one_of("eager", "sdpa"),
    **dict.fromkeys(("dtype", "torch_dtype"), _one_of("float32", "bfloat16", "float16")),
    "ignore_mismatched_sizes": FLAG,
}
OPTIONS: dict[str, dict[str, Kind]] = {
    "timm": _TIMM,
    "torchvision": _TORCHVISION,
    "hf": {**_TRANSFORMERS, "revision": _WORD},
    "bundled": _TRANSFORMERS,
}
"""Options that a file may ask for, by the place of the backbone."""

SIZES = frozenset(key for options in OPTIONS.values() for key, kind in options.items() if kind in _SIZE_KINDS)
"""Options that decide how large a backbone is."""

_NAMES = {
    "timm": r"\w+(\.\w+)*",
    "torchvision": r"\w+",
    "hf": r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?",
    "bundled": r"\w+",
}


def may_name(name: str) -> bool:
    """Whether a file may use this name of a backbone: not a local path, nor one of timm's own addresses."""
    place, _, rest = name.partition("/")
    if place not in _NAMES or not re.fullmatch(_NAMES[place], rest, re.ASCII | re.IGNORECASE) or len(name) > 200:
        return False
    # transformers takes a folder of that name in preference to the repository
    return place != "hf" or (".." not in rest and not os.path.exists(rest))


def objections(name: str, build: Mapping[str, Any]) -> list[str]:
    """What a file must not ask for, each in a few words; empty if it may ask for all of it.

    Args:
        name: of the backbone.
        build: options for its loader, as JSON values.
    """
    place = name.partition("/")[0]
    known = OPTIONS.get(place, {})
    refused = [] if may_name(name) else [f"the backbone {name!r:.200} (a local path, or not a plain name)"]
    return refused + [
        f"{key}={value!r:.60}" + (f" ({key} must be {known[key].what})" if key in known else "")
        for key, value in build.items()
        if key not in known or not known[key].holds(value)
    ]
