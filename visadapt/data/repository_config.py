"""What the configuration of a repository may ask of transformers, where only a file names the repository.

Its config.json describes an architecture, in options that differ by model. Some options lead elsewhere: to attention
kernels that are downloaded and run, to a model of timm by an address or with a checkpoint from a local path, to a
backbone in another repository, to kernels of a quantisation. Only values that need nothing beyond the repository and
the installed libraries are accepted for these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visadapt.data.allowlist import MOST_BLOCKS, objections
from visadapt.errors import VisadaptError
from visadapt.reading import read_json

CONFIG = "config.json"

_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""Of attention and of experts: those of torch and transformers; all others are kernels that may be downloaded."""

_QUANTISATIONS = (None, "bitsandbytes", "torchao", "quanto", "hqq")
"""Methods of installed libraries; the others run kernels that transformers downloads."""

_TIMM = ("timm_wrapper", "timm_backbone")

_ELSEWHERE = ("backbone", "use_timm_backbone", "use_pretrained_backbone")
"""Options of a model around a backbone, which earlier versions of transformers load by its name."""

# each layer takes time to be built, even without memory
_LAYERS = re.compile(r"(.*_)?(layers?|depths?|blocks?)")
"""Names of options that count layers, such as ``num_hidden_layers`` and ``n_layer``."""

_DEPTHS = re.compile(r"(.*_)?depths|layers")
"""Names of lists that count the layers of each stage."""

_WORDS = frozenset((
    "image_processor_type", "feature_extractor_type", "processor_class", "_name_or_path", "interpolation",
    "data_format", "input_data_format",
))  # fmt: skip
"""Options of an image processor that may be a text; in others, a text is a path or the name of a repository."""


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON object of a repository, within the bounds of `visadapt.limits.LIMITS`.

    Raises:
        VisadaptError: it cannot be read, or is not a JSON object.
    """
    try:
        config = read_json(file)
    except VisadaptError:
        raise
    except (ValueError, RecursionError) as error:
        raise VisadaptError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise VisadaptError(f"{file} must be a JSON object, got {type(config).__name__}")
    return config


def model_objections(config: Any) -> list[str]:
    """What the config.json of a model must not ask for, each in a few words; the configs of its parts included."""
    return list(_model_objections(config))


def processor_objections(config: Mapping[str, Any]) -> list[str]:
    """What the preprocessor_config.json of an image processor must not ask for, each in a few words."""
    return [f"{key}={value!r:.60}" for key, value in config.items() if isinstance(value, str) and key not in _WORDS]


def _model_objections(config: Any) -> Iterator[str]:
    if isinstance(config, list):
        for each in config:
            yield from _model_objections(each)
    if not isinstance(config, Mapping):
        return
    # transformers takes a config with timm's description of weights for one of timm's
    timm = config.get("model_type") in _TIMM or "pretrained_cfg" in config
    if timm:
        name, options = config.get("architecture", config.get("backbone")), config.get("model_args") or {}
        yield from objections(f"timm/{name}", options if isinstance(options, Mapping) else {"model_args": options})
    for key, value in config.items():
        if str(key).removesuffix("_internal").endswith(("attn_implementation", "experts_implementation")):
            chosen = value.values() if isinstance(value, Mapping) else (value,)
            refused = any(each not in _IMPLEMENTATIONS for each in chosen)
        elif _LAYERS.fullmatch(str(key)) and isinstance(value, int):
            refused = value > MOST_BLOCKS
        elif _DEPTHS.fullmatch(str(key)) and isinstance(value, list) and all(isinstance(n, int) for n in value):
            refused = sum(value) > MOST_BLOCKS
        elif key == "quantization_config":
            refused = not isinstance(value, Mapping) or value.get("quant_method") not in _QUANTISATIONS
        else:
            refused = bool(value) and key in _ELSEWHERE and not (timm and key == "backbone")
        if refused:
            yield f"{key}={value!r:.60}"
        elif not (timm and key in ("model_args", "pretrained_cfg")):
            yield from _model_objections(value)
