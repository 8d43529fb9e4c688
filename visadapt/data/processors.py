"""Images as an image processor of transformers prepares them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visadapt.data.allowlist import FLAG, SIDE, Kind, real, whole
from visadapt.data.image_file import check_resized
from visadapt.data.image_inputs import ImageInputs
from visadapt.errors import VisadaptError, nearest
from visadapt.optional import available, require
from visadapt.reading import check_readable

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ProcessorInputs(ImageInputs):
    """Images for a vision backbone of transformers, prepared by its image processor.

    Where the result is the same, the processor runs in two parts: resize and crop when an image is read, as uint8;
    rescale and normalise when a batch enters the network. Other processors run when an image is read, and batches are
    floats.

    Args:
        processor: the processor's configuration: ``image_processor_type`` and the options of resizing, cropping and
            normalisation.
        parts: 2 or 1.
    """

    processor: dict[str, Any] = field(default_factory=dict, hash=False)
    parts: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_configuration(self.processor)
        if self.parts not in (1, 2):
            raise VisadaptError(f"parts must be 1 or 2, got {self.parts!r}")

    @classmethod
    def of(cls, processor: Any, name: str, size: int | None = None) -> ProcessorInputs:
        """Describe a processor.

        Args:
            processor: of transformers.
            name: of the backbone, for messages.
            size: side of the square images in pixels; None for the processor's own.

        Raises:
            VisadaptError: the processor gives images of several sizes.
        """
        described = processor.to_dict()
        config = json.loads(json.dumps({key: described[key] for key in _OPTIONS if described.get(key) is not None}))
        config["image_processor_type"] = type(processor).__name__
        if size is not None:
            config = _resized(config, size)
        shown = torch.randint(256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images = [shown, shown.transpose(1, 2).contiguous()]
        built = _built(config)
        try:
            whole = [_pixel_values(built([image], return_tensors="pt")) for image in images]
        except Exception as error:  # processors differ in what they take
            raise VisadaptError(f"the image processor of {name} cannot be used for classification: {error}") from error
        shapes = {tuple(image.shape[1:]) for image in whole}
        _, height, width, *_ = (*next(iter(shapes)), 0, 0, 0)
        if len(shapes) != 1 or height != width:
            raise VisadaptError(f"the image processor of {name} must make squares of one size, got {sorted(shapes)}")
        return cls(height, processor=config, parts=2 if _divisible(built, images, whole) else 1)

    @property
    def in_bytes(self) -> bool:
        return self.parts == 2

    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images
        if images.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            images = F.interpolate(images.float(), side, mode="bilinear", antialias=True).round().to(torch.uint8)
        options = _NORMALISE if self.parts == 2 else {}
        return _prepared(self.processor, list(images), **options)

    def pixels(self, image: Image) -> Tensor:
        check_resized(image, self.size)
        if self.parts == 1:
            return _prepared(self.processor, [image])[0]
        return _uint8(_prepared(self.processor, [image], **_CROP))[0]


def _divisible(built: Callable[..., Any], images: list[Tensor], whole: list[Tensor]) -> bool:
    try:
        cropped = [_uint8(_pixel_values(built([image], **_CROP, return_tensors="pt"))) for image in images]
        split = [_pixel_values(built(list(image), **_NORMALISE, return_tensors="pt")) for image in cropped]
    except Exception:  # some take floats only, or not without their resize
        return False
    return all(map(torch.equal, whole, split))


_CROP = {"do_rescale": False, "do_normalize": False}

_NORMALISE = {"do_resize": False, "do_center_crop": False}


def processor_of(backbone: str, **options: Any) -> Any:
    """Load the image processor of a backbone of transformers; None if it has none.

    Args:
        backbone: ``"hf/<name or folder>"``.
        **options: passed to ``AutoImageProcessor.from_pretrained``.
    """
    if not backbone.startswith("hf/") or not available("transformers"):
        return None
    transformers = require("transformers", "an image processor", "visadapt[text]")
    check_readable(backbone.removeprefix("hf/"))
    try:
        return transformers.AutoImageProcessor.from_pretrained(backbone.removeprefix("hf/"), **options)
    except (OSError, ValueError, KeyError):
        return None


def _sizes(value: Any) -> bool:
    keys = {"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"}
    if isinstance(value, Mapping):
        return 1 <= len(value) <= 2 and set(value) <= keys and all(map(SIDE.holds, value.values()))
    return SIDE.holds(value)


def _three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(real(-1e6, 1e6).holds, value))


_SIZES = Kind('an integer, or an object such as {"height": 224, "width": 224}', _sizes)
_THREE = Kind("three numbers", _three)
_OPTIONS: dict[str, Kind] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), FLAG),
    **dict.fromkeys(("size", "crop_size"), _SIZES),
    **dict.fromkeys(("image_mean", "image_std"), _THREE),
    "resample": whole(0, 5),
    "rescale_factor": real(1e-9, 1e3),
    "crop_pct": real(0.05, 2),
}
"""Options of an image processor that a task file may set."""


def check_configuration(config: Any) -> None:
    """Refuse a configuration that asks for more than resizing, cropping and normalisation.

    Raises:
        VisadaptError: the message names the option and what it must be.
    """
    kind = config.get("image_processor_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Z][A-Za-z0-9]{0,60}ImageProcessor(Fast|Pil)?", kind):
        raise VisadaptError(f"image_processor_type must name an image processor of transformers, got {kind!r:.60}")
    for key, value in config.items():
        if key == "image_processor_type":
            continue
        if key not in _OPTIONS:
            raise VisadaptError(f"an image processor must not set {key!r:.60}{nearest(str(key), _OPTIONS)}")
        if not _OPTIONS[key].holds(value):
            raise VisadaptError(f"{key} of the image processor must be {_OPTIONS[key].what}, got {value!r:.60}")


_PROCESSORS: dict[str, Callable[..., Any]] = {}


def _built(config: Mapping[str, Any]) -> Callable[..., Any]:
    key = repr(sorted(config.items(), key=lambda item: item[0]))
    if key not in _PROCESSORS:
        transformers = require("transformers", "the preprocessing of the backbone", "visadapt[text]")
        kind = config["image_processor_type"]
        processor = getattr(transformers, kind, None)
        if not isinstance(processor, type):
            raise VisadaptError(f"this version of transformers has no image processor {kind!r}")
        options = {name: value for name, value in config.items() if name != "image_processor_type"}
        try:
            _PROCESSORS[key] = processor(**options)
        except Exception as error:  # processors differ in what they take
            raise VisadaptError(f"transformers cannot build the image processor {kind!r}: {error}") from error
    return _PROCESSORS[key]


def _prepared(config: Mapping[str, Any], images: list[Any], **options: Any) -> Tensor:
    try:
        return _pixel_values(_built(config)(images, **options, return_tensors="pt"))
    except VisadaptError:
        raise
    except Exception as error:  # one that is not for classification, say
        kind = config["image_processor_type"]
        raise VisadaptError(f"the image processor {kind!r} cannot prepare images: {error!r:.200}") from error


def _pixel_values(features: Any) -> Tensor:
    values = features["pixel_values"]
    return values if isinstance(values, Tensor) else torch.stack([torch.as_tensor(value) for value in values])


def _uint8(values: Tensor) -> Tensor:
    if values.dtype != torch.uint8 and not torch.equal(values, values.round()):
        raise VisadaptError("an image processor must resize to 8-bit values")
    return values.to(torch.uint8)


def _resized(config: dict[str, Any], size: int) -> dict[str, Any]:
    """The same processing for another side."""
    square = {"height": size, "width": size}
    if not config.get("do_center_crop"):
        return {**config, "size": square}
    crop = config.get("crop_size", square)
    crop = crop if isinstance(crop, int) else next(iter(crop.values()))
    before = config.get("size", square)
    edges = {"shortest_edge": before} if isinstance(before, int) else dict(before)
    return {
        **config,
        "size": {key: max(size, round(edge * size / crop)) for key, edge in edges.items()},
        "crop_size": square,
    }
