"""Samples: images and texts as a request gives them, within the limits; images are decoded when they are needed."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visadapt.optional import require
from visadapt.serving.limits import Limits
from visadapt.serving.refusal import ServingError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of images that are decoded; Pillow's others run programs (EPS), or are rare and so less tested."""


@dataclass(frozen=True)
class Sample:
    """One input.

    Args:
        kind: ``"image"`` or ``"text"``.
        value: an encoded image (bytes) or an image of Pillow; a text, or a pair of texts.
    """

    kind: str
    value: Any


def accept(given: Any, limits: Limits) -> Sample:
    """Check the form and the size of one input; no image is decoded.

    Args:
        given: an encoded image (bytes), an image of Pillow, a uint8 tensor ``(3, H, W)``, a text, a pair of texts, or
            a dict ``{"image": base64}`` or ``{"text": …}`` as HTTP requests have it.
        limits: upper bounds.

    Raises:
        ServingError: the input is of no such form, or larger than the limits.
    """
    if isinstance(given, Mapping):
        return _from_json(given, limits)
    if isinstance(given, str) or (isinstance(given, tuple | list) and all(isinstance(part, str) for part in given)):
        return _text(given, limits)
    if isinstance(given, bytes | bytearray):
        return _encoded(bytes(given), limits)
    if isinstance(given, Tensor):
        if given.dtype != torch.uint8 or given.ndim != 3 or given.shape[0] != 3:
            raise _invalid(f"an image must be uint8 of shape (3, H, W), got {given.dtype} of {tuple(given.shape)}")
        _check_pixels(given.shape[1] * given.shape[2], limits)
        return Sample("image", _pil().fromarray(given.permute(1, 2, 0).contiguous().numpy()))
    if isinstance(given, _pil().Image):
        _check_pixels(given.width * given.height, limits)
        return Sample("image", given)
    raise _invalid(f"an input must be an image or a text, got {type(given).__name__}")


def _from_json(given: Mapping[str, Any], limits: Limits) -> Sample:
    if set(given) == {"text"}:
        text = given["text"]
        if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(part, str) for part in text)):
            raise _invalid(f"'text' must be a string or a list of two strings, got {type(text).__name__}")
        return _text(text, limits)
    if set(given) == {"image"}:
        text = given["image"]
        if not isinstance(text, str):
            raise _invalid(f"'image' must be a base64 string, got {type(text).__name__}")
        # a data URL, as browsers make it
        head, comma, _ = text[:100].partition(",")
        text = text[len(head) + 1 :] if comma and head.startswith("data:") and head.endswith(";base64") else text
        if len(text) * 3 // 4 > limits.image:
            raise _too_large("an image", f"{limits.image:,} bytes", "send a smaller image")
        try:
            return _encoded(base64.b64decode(text, validate=True), limits)
        except binascii.Error as error:
            raise ServingError("undecodable", f"'image' is not base64: {error}", "encode the file as base64") from error
    keys = ", ".join(f"{key!r:.40}" for key in sorted(given)[:3]) or "no key"
    raise _invalid(f"an input must have one key, 'image' or 'text', got {keys}")


def _encoded(data: bytes, limits: Limits) -> Sample:
    if len(data) > limits.image:
        raise _too_large("an image", f"{limits.image:,} bytes", "send a smaller image")
    return Sample("image", data)


def decode(sample: Sample, limits: Limits) -> Any:
    """Decode the image of a sample; the sample keeps what it was given.

    Returns:
        An image of Pillow, loaded.

    Raises:
        ServingError: it cannot be decoded, or has more pixels than the limits allow.
    """
    data = sample.value
    encoded = isinstance(data, bytes)
    try:
        image = _pil().open(io.BytesIO(data), formats=FORMATS) if encoded else data
        # known from the header, before any pixel is decoded
        _check_pixels(image.width * image.height, limits)
        image.load()
    except ServingError:
        raise
    except (_pil().DecompressionBombError, _pil().DecompressionBombWarning) as error:
        # Pillow's own bound, checked before ours
        raise _too_large("an image", f"{limits.pixels:,} pixels", "scale the image down") from error
    except Exception as error:  # each of Pillow's formats has its own errors for damaged files
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "its format is unknown" if unknown else str(error) or type(error).__name__
        message = f"{f'{len(data):,} bytes are' if encoded else 'this is'} not a readable image: {reason}"
        raise ServingError("undecodable", message, "send a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file") from error
    return image


def check_resized(image: Any, size: int, limits: Limits) -> None:
    """Refuse an image that is so long and narrow that it has too many pixels once its shorter side is ``size``.

    Raises:
        ServingError: it is.
    """
    scale = size / min(image.size)
    _check_pixels(round(image.width * scale * image.height * scale), limits)


def _check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.pixels:
        raise _too_large("an image", f"{limits.pixels:,} pixels", "scale the image down")


def _text(given: Any, limits: Limits) -> Sample:
    parts = (given,) if isinstance(given, str) else tuple(given)
    if len(parts) not in (1, 2):
        raise _invalid(f"a text must be a string or a pair of strings, got {len(parts)} strings")
    if sum(map(len, parts)) > limits.text:
        raise _too_large("a text", f"{limits.text:,} characters", "send a shorter text")
    if any("\ud800" <= character <= "\udfff" for part in parts for character in part):
        raise ServingError("undecodable", "a text must be valid Unicode, got a lone surrogate", "send UTF-8")
    return Sample("text", parts[0] if len(parts) == 1 else parts)


def _invalid(message: str) -> ServingError:
    return ServingError("invalid_request", message, 'send {"image": "<base64>"} or {"text": "…"}')


def _too_large(what: str, most: str, remedy: str) -> ServingError:
    return ServingError("too_large", f"{what} must not have more than {most}", remedy)


def _pil() -> Any:
    return require("PIL.Image", "an image", "pillow")
