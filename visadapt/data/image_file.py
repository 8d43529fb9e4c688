"""Read one image: upright, RGB, 8 bits per channel, transparency on white."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visadapt.data.bounded import open_image
from visadapt.errors import VisadaptError
from visadapt.limits import check_limit
from visadapt.optional import available, require

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".hif", ".ico", ".jfif", ".jpe", ".jpeg", ".jpg",
    ".jp2", ".j2k", ".pbm", ".pgm", ".png", ".apng", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
"""Suffixes of image files, in lower case."""

_HEIF = (".heic", ".heics", ".heif", ".hif")

_PLUGINS: set[str] = set()


def pil() -> Any:
    """Import Pillow's ``Image``, with the formats of pillow-heif where that is installed.

    Raises:
        VisadaptError: Pillow is not installed.
    """
    module = require("PIL.Image", "loading images", "pillow")
    if "heif" not in _PLUGINS and available("pillow_heif"):
        require("pillow_heif", "reading HEIC files", "pillow-heif").register_heif_opener()
        _PLUGINS.add("heif")
    return module


def read_image(source: Any) -> Image:
    """Read an image as RGB with 8 bits per channel.

    The orientation that EXIF notes is applied, transparent pixels are laid on white, 16-bit values are scaled to 8
    bits, and of an animation the first frame is taken.

    Args:
        source: a path; an image of Pillow; a uint8 tensor ``(3, H, W)``; or a mapping with ``bytes`` or ``path``, as
            the ``datasets`` library stores images.

    Raises:
        VisadaptError: the file is damaged, has a format that is not supported, or has pixels without a known range.
    """
    image_module = pil()
    where = _name(source)
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3:
            got = f"{source.dtype} of {tuple(source.shape)}"
            raise VisadaptError(f"an image that is a tensor must be uint8 of shape (3, H, W), got {got}")
        return to_image(source)
    if isinstance(source, Mapping):
        content = source.get("bytes")
        source = source.get("path") if content is None else io.BytesIO(content)
    if isinstance(source, image_module.Image):
        return _rgb(_upright(source), where, source.format)
    if not isinstance(source, str | Path | io.BytesIO):
        made = ": PIL.Image.fromarray makes one of an array (H, W, 3)" if type(source).__name__ == "ndarray" else ""
        raise VisadaptError(f"an image must be a path or an image of Pillow, got {type(source).__name__}{made}")
    try:
        opened = open_image(source, where)
    except VisadaptError as error:
        suffix = Path(where).suffix.lower()
        if suffix in _HEIF and not available("pillow_heif"):
            raise VisadaptError(f"{where}: {suffix} files need pillow-heif: pip install pillow-heif") from error
        raise
    return _rgb(_upright(opened), where, opened.format)


def to_tensor(image: Image) -> Tensor:
    """Convert an RGB image to uint8, ``(3, H, W)``."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image:
    """Convert uint8 values ``(3, H, W)`` to an RGB image of Pillow."""
    return pil().fromarray(pixels.permute(1, 2, 0).contiguous().numpy())  # type: ignore[no-any-return]


def check_resized(image: Image, size: int) -> None:
    """Refuse an image that is so long and narrow that resizing its shorter side to ``size`` takes too much memory.

    Raises:
        VisadaptError: it would have more pixels than `visadapt.limits.LIMITS` allows.
    """
    scale = size / max(1, min(image.size))
    what = f"an image of {image.width} × {image.height} pixels, resized to {size} on its shorter side,"
    check_limit(image.width * scale * image.height * scale, "IMAGE_PIXELS", what)


def to_square(image: Image, size: int) -> Image:
    """Resize the shorter side to ``size``, bilinearly, and crop the centre."""
    check_resized(image, size)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), pil().Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square_pixels(image: Image, size: int) -> Tensor:
    """Convert an image to uint8, ``(3, size, size)``, as `to_square` crops it."""
    return to_tensor(to_square(image, size))


def _name(source: Any) -> str:
    if isinstance(source, Mapping):
        return str(source.get("path") or "an image of the data set")
    filename = getattr(source, "filename", None)
    return str(source) if isinstance(source, str | Path) else str(filename or "an image")


def _upright(image: Image) -> Image:
    try:
        return require("PIL.ImageOps", "loading images", "pillow").exif_transpose(image)  # type: ignore[no-any-return]
    except Exception:  # EXIF data that cannot be read do not say how the image was turned
        return image.copy()


def _rgb(image: Image, where: str, kind: str | None) -> Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        # Pillow alone would clip 16-bit values at 255
        numpy = require("numpy", "loading 16-bit images", "numpy")
        image = pil().fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    elif image.mode in ("I", "F"):
        raise VisadaptError(
            f"{where}: 32-bit pixels (mode {image.mode!r}) have no known range: save the image with 16 bits"
        )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = pil().new("RGBA", layer.size, "white")
        image = pil().alpha_composite(white, layer)
    return image.convert("RGB")
