"""Inputs: how images and texts are prepared for a backbone, in a form that task files record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.trace import guess_input
from visadapt.data.file_requests import check_tokenizer, tokenizer
from visadapt.data.image_inputs import ImageInputs as ImageInputs
from visadapt.data.processors import ProcessorInputs, processor_of
from visadapt.data.splits import Splits as Splits
from visadapt.data.text_inputs import TextInputs as TextInputs
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.typed import from_json

Inputs = ImageInputs | TextInputs

_KINDS: dict[str, type[ImageInputs] | type[TextInputs]] = {
    "processor": ProcessorInputs,
    "images": ImageInputs,
    "texts": TextInputs,
}


def inputs_of(
    model: nn.Module,
    name: str,
    size: int | None = None,
    length: int | None = None,
    *,
    processor: Callable[[str], Any] = processor_of,
) -> Inputs:
    """Return the kind of inputs that a backbone takes.

    Args:
        model: the backbone.
        name: its name, as `visadapt.inject` takes it.
        size: image side in pixels; None for the side that the backbone was trained at.
        length: maximum tokens per text; None for 128.
        processor: loads the image processor of a backbone of transformers by its name; None if it has none.

    Raises:
        VisadaptError: a size was given for texts or a length for images, or the backbone takes neither.
    """
    if getattr(model, "main_input_name", None) == "input_ids":
        if size is not None:
            raise VisadaptError(f"{name} takes texts: give a length instead of a size")
        return TextInputs(name) if length is None else TextInputs(name, length)
    if length is not None:
        raise VisadaptError(f"{name} takes images: give a size instead of a length")
    example = guess_input(model)
    if not isinstance(example, Tensor) or example.ndim != 4:
        raise VisadaptError(f"{name} must take images or texts, got a backbone of another kind")
    if getattr(model, "main_input_name", None) == "pixel_values":
        loaded = processor(name)
        if loaded is not None:
            return ProcessorInputs.of(loaded, name, size)
    published = getattr(model, "pretrained_cfg", None) or {}
    side = example.shape[-1] if size is None else size
    if not published:
        return ImageInputs(side)
    config = require("timm.data", "the preprocessing of the backbone", "timm").resolve_data_config(
        pretrained_cfg=published
    )
    return ImageInputs(
        side,
        tuple(map(float, config["mean"])),
        tuple(map(float, config["std"])),
        float(config["crop_pct"]),
        config["interpolation"],
        config["crop_mode"],
    )


def check_texts(model: nn.Module, inputs: TextInputs) -> None:
    """Check that a tokenizer gives what a model takes.

    Raises:
        VisadaptError: it has more tokens than the model, or does not end texts with the token that the model needs.
    """
    config: Any = getattr(model, "config", None)
    tokens = inputs.read(["a\tb"])["input_ids"][0].tolist()
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and max(len(inputs.tokens), *tokens) > size:
        raise VisadaptError(
            f"the tokenizer of {inputs.tokenizer} has {len(inputs.tokens)} tokens, and the model only {size}: save the "
            "tokenizer that the model was trained with into its folder"
        )
    end = getattr(config, "eos_token_id", None)
    # models of this form read their answer at the end-of-text token
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and tokens.count(end) != 1:
        raise VisadaptError(
            f"the tokenizer of {inputs.tokenizer} must end each text with token {end}, which the model needs, got "
            f"{tokens.count(end)} of it"
        )


def described(inputs: Inputs) -> dict[str, Any]:
    """Describe inputs as JSON values, for the notes of a task file."""
    kind = next(kind for kind, form in _KINDS.items() if isinstance(inputs, form))
    return {"kind": kind, **{f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs) if f.compare}}


def from_description(description: Mapping[str, Any], *, backbone: str | None = None, online: bool = False) -> Inputs:
    """Rebuild inputs from the output of `described`, as a file holds it.

    Args:
        description: output of `described`.
        backbone: name of a backbone whose tokenizer is the caller's own choice: it is loaded without restrictions where
            the description names the same, and in place of a local path, which a file may not choose.
        online: whether a tokenizer that only the description names may be downloaded.

    Raises:
        VisadaptError: a field is unknown, of another type or out of bounds; a tokenizer that no file may choose.
    """
    kinds = " or ".join(_KINDS)
    if not isinstance(description, Mapping):
        raise VisadaptError(f"a description of inputs must have a kind ({kinds}) and options, got {description!r}")
    fields = {key: value for key, value in description.items() if key != "kind"}
    try:
        if "loader" in fields:
            raise TypeError("loader is not part of it")
        inputs = from_json(_KINDS[description["kind"]], fields)
    except (KeyError, TypeError) as error:
        raise VisadaptError(f"a description of inputs must have a kind ({kinds}) and options: {error}") from error
    if not isinstance(inputs, TextInputs) or inputs.tokenizer == backbone:
        return inputs
    try:
        check_tokenizer(inputs.tokenizer)
    except VisadaptError:
        if backbone is None:
            raise
        return dataclasses.replace(inputs, tokenizer=backbone)
    return dataclasses.replace(inputs, loader=partial(tokenizer, online=online))
