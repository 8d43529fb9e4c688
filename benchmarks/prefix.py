"""An epoch of training on the prefix cache, over the first one, which makes it.

python -m benchmarks.prefix
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor

import visadapt
from benchmarks.measure import Row, exact, given, operations, profile, spread, tell
from visadapt.frozen import CachedPrefix


def epoch(cached: CachedPrefix, labels: Tensor, batch: int, optimiser: torch.optim.Optimizer) -> None:
    """Trains on every image once, from what is kept of it."""
    for rows in cached.rows.split(batch):
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(cached(rows).resume(), labels[rows]).backward()
        optimiser.step()


def epochs(where: object, x: Tensor, labels: Tensor, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The first epoch, which makes the cache, and a later one."""
    model = torchvision.models.resnet50(weights=None).to(x.device)
    visadapt.inject(model, m=32, where=where, task="t", num_classes=10, norms="frozen")
    visadapt.lean(model).train()
    optimiser = torch.optim.AdamW(visadapt.parameters(model, "t"))
    caches: list[CachedPrefix] = []

    def first() -> None:
        caches.append(visadapt.cache_prefix(model, "t", x, batch_size=batch))
        epoch(caches[0], labels, batch, optimiser)

    return first, lambda: epoch(caches[0], labels, batch, optimiser)


def later_over_first(cost: Callable[[Callable[[], None]], float], *setting: Any) -> float:
    """What a later epoch costs over what the first does."""
    first, later = epochs(*setting)
    whole = cost(first)
    return cost(later) / whole


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
        setting = (where, x, labels, batch)
        figure = f"a later epoch on the prefix cache / the first ({what} adapted)"
        yield exact(f"operations: {figure}", at, later_over_first(operations, *setting))
        ratios = [later_over_first(seconds, *setting) for _ in range(repeats)]
        yield spread(f"prefix cache: a later epoch / the first ({what} adapted)", at, ratios, "×")
        first, later = epochs(*setting)
        first()
        yield from profile(f"a later epoch on the prefix cache, {what} adapted", at, later)


if __name__ == "__main__":
    told = given(__doc__, size=96, images=64, batch=16, repeats=3)
    tell(measure(told.size, told.images, told.batch, told.repeats, told.device))
