"""Generated images of discs, squares and crosses on a noisy background, with boxes and masks."""

import torch
from torch import Tensor

NAMES = ("background", "disc", "square", "cross")


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Draw one to three shapes per image.

    Args:
        count: number of images.
        size: their side in pixels.
        seed: of everything that is drawn.

    Returns:
        Images ``(count, 3, size, size)`` in [0, 1]; per image its ``boxes`` ``(n, 4)`` in pixels and ``labels``
        ``(n,)``, from 1; masks ``(count, size, size)`` of class indices, 0 for the background.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.3 * torch.rand(count, 3, size, size, generator=generator)
    masks = torch.zeros(count, size, size, dtype=torch.int64)
    targets = []
    for image, mask in zip(images, masks, strict=True):
        boxes, labels = [], []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            radius = int(torch.randint(size // 10, size // 5, (), generator=generator))
            y, x = torch.randint(radius, size - radius, (2,), generator=generator).tolist()
            label = int(torch.randint(1, 4, (), generator=generator))
            box = x - radius, y - radius, x + radius, y + radius
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                continue
            down, right = (rows - y).abs(), (columns - x).abs()
            inside = {
                1: down**2 + right**2 <= radius**2,
                2: (down <= radius) & (right <= radius),
                3: (torch.minimum(down, right) <= radius // 3) & (torch.maximum(down, right) <= radius),
            }[label]
            image[:, inside] += 0.3 + 0.4 * torch.rand(3, 1, generator=generator)
            mask[inside] = label
            boxes.append(box)
            labels.append(label)
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})
    return images, targets, masks
