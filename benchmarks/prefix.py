"""An epoch of training on the prefix cache, over the first one, which makes it.

python -m benchmarks.prefix
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor

import visadapt
from benchmarks.measure import Row, exact, given, operations, spread, tell
from visadapt.frozen import CachedPrefix


def epoch(cached: CachedPrefix, labels: Tensor, batch: int, optimiser: torch.optim.Optimizer) -> None:
    """Trains on every image once, from what is kept of it."""
    for rows in cached.rows.split(batch):
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(cached(rows).resume(), labels[rows]).backward()
        optimiser.step()


def epochs(
    where: object, x: Tensor, labels: Tensor, batch: int, cost: Callable[[Callable[[], None]], float]
) -> tuple[float, float]:
    """What the first epoch costs, which makes the cache, and the second."""
    model = torchvision.models.resnet50(weights=None).to(x.device)
    visadapt.inject(model, m=32, where=where, task="t", num_classes=10, norms="frozen")
    visadapt.lean(model).train()
    optimiser = torch.optim.AdamW(visadapt.parameters(model, "t"))
    caches: list[CachedPrefix] = []

    def first() -> None:
        caches.append(visadapt.cache_prefix(model, "t", x, batch_size=batch))
        epoch(caches[0], labels, batch, optimiser)

    return cost(first), cost(lambda: epoch(caches[0], labels, batch, optimiser))


def seconds(run: Callable[[], None]) -> float:
    """That it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(size: int, images: int, batch: int, repeats: int, device: str) -> Iterator[Row]:
    """ResNet-50 with adapters in its last stage, and in its last block."""
    x, labels = torch.randn(images, 3, size, size, device=device), torch.arange(images, device=device) % 10
    at = f"ResNet-50, m=32, {images} images, batch {batch}, {size} px"
    for where, what in (("layer4", "last stage"), (slice(-1, None), "last block")):
        first, later = epochs(where, x, labels, batch, operations)
        yield exact(f"operations: a later epoch on the prefix cache / the first ({what} adapted)", at, later / first)
        taken = [epochs(where, x, labels, batch, seconds) for _ in range(repeats)]
        ratios = [later / first for first, later in taken]
        yield spread(f"prefix cache: a later epoch / the first ({what} adapted)", at, ratios, "×")


if __name__ == "__main__":
    told = given(__doc__, size=96, images=64, batch=16, repeats=3)
    tell(measure(told.size, told.images, told.batch, told.repeats, told.device))
