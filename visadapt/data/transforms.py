"""Transforms of image batches: normalisation for a pretrained network, and a light augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visadapt.arguments import readable, takes
from visadapt.checks import check_count
from visadapt.errors import VisadaptError, device_errors
from visadapt.printable import shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)


@takes()
def normalize(
    images: Tensor,
    size: int | None = None,
    device: torch.device | str | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Convert uint8 images to the normalised float batch that a pretrained network expects.

    Args:
        images: uint8, ``(N, 3, H, W)``, 0 to 255.
        size: side in pixels of the square result, by bilinear interpolation with antialiasing; None keeps the size.
        device: device of the result; the uint8 images are moved before they are converted.
        mean: of the three channels, in units of 1, subtracted.
        std: of the three channels, in units of 1, divided by.

    Returns:
        float32, ``(N, 3, size, size)``.

    Raises:
        VisadaptError: the images are not a uint8 batch of three channels.

    Examples:
        >>> from visadapt.data import normalize
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> batch = normalize(images, 64)
        >>> batch.shape, round(float(batch[0, 0, 0, 0]), 3)
        (torch.Size([2, 3, 64, 64]), -2.118)
    """
    if size is not None:
        check_count(size, "size")
    _check(images)
    if images.dtype != torch.uint8:
        raise VisadaptError(f"images must be uint8, got {images.dtype}")
    for name, each in (("mean", mean), ("std", std)):
        if not readable(each, Sequence[float]) or len(each) != images.shape[1]:
            raise VisadaptError(f"{name} must have one number per channel, {images.shape[1]}, got {shown(each, 80)}")
    with device_errors(device):
        x = images.to(device).float().div_(255)
    if size is not None and x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    centre, scale = (_moved(torch.tensor(each, dtype=x.dtype, device="cpu"), x).view(-1, 1, 1) for each in (mean, std))
    return x.sub_(centre).div_(scale)


@takes()
def augment(images: Tensor, generator: torch.Generator, *, flip: bool = True, crop_padding: int = 4) -> Tensor:
    """Shift every image by a random crop of its zero-padded copy, and mirror half of them.

    Args:
        images: ``(N, 3, H, W)``, uint8 or float.  Zero padding is black on uint8 and the mean colour on a
            normalised batch.
        generator: draws the shifts and flips, the same on every device for the same seed.
        flip: whether to mirror left and right; use False where direction matters, as for digits.
        crop_padding: pixels of padding on each side, the largest shift.

    Returns:
        A batch of the same shape, dtype and device.

    Raises:
        VisadaptError: the images are not a batch, or the padding is negative.

    Examples:
        >>> from visadapt.data import augment
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> augment(images, torch.Generator().manual_seed(0), flip=False).shape
        torch.Size([2, 3, 32, 32])
    """
    _check(images)
    if crop_padding < 0:
        raise VisadaptError(f"crop_padding must not be negative, got {crop_padding}")
    count, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        return _moved(torch.randint(high, (count,), generator=generator, device=generator.device), images)

    if crop_padding:
        rows = draw(2 * crop_padding + 1)[:, None] + torch.arange(height, device=images.device)
        columns = draw(2 * crop_padding + 1)[:, None] + torch.arange(width, device=images.device)
        padded = F.pad(images, (crop_padding,) * 4)
        batch = torch.arange(count, device=images.device)[:, None, None]
        images = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        images = torch.where(draw(2).bool().view(-1, 1, 1, 1), images.flip(-1), images)
    return images.contiguous()


def _moved(values: Tensor, images: Tensor) -> Tensor:
    """Move values to the device of images; on a GPU without waiting for the kernels of the step before."""
    if images.is_cuda and not values.is_cuda:
        values = values.pin_memory()
    return values.to(images.device, non_blocking=images.is_cuda)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise VisadaptError(f"images must be of shape (N, 3, H, W), got {tuple(images.shape)}")
