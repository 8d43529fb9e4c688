"""An epoch of training on the prefix cache / the first epoch, which fills it.

python -m benchmarks.prefix
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import visadapt
from benchmarks.measure import (
    OPTIMISER,
    Row,
    exact,
    operations,
    optimiser,
    parse_args,
    print_rows,
    profile,
    resnet50,
    spread,
)
from visadapt.frozen import CachedPrefix


def epoch(cached: CachedPrefix, labels: Tensor, batch: int, trained: torch.optim.Optimizer) -> None:
    """Train on every image once, from the cache."""
    for rows in cached.rows.split(batch):
        trained.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(cached(rows).resume(), labels[rows]).backward()
        trained.step()


def epochs(
    method: object, where: object, x: Tensor, labels: Tensor, batch: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that run the first epoch, which fills the cache, and a later one."""
    model = resnet50().to(x.device)
    visadapt.inject(model, method, where=where, task="t", num_classes=10, norms="frozen")
    visadapt.lean(model).train()
    trained = optimiser(visadapt.parameters(model, "t"), lr=1e-3)
    caches: list[CachedPrefix] = []

    def first() -> None:
        caches.append(visadapt.cache_prefix(model, "t", x, batch_size=batch))
        epoch(caches[0], labels, batch, trained)

    return first, lambda: epoch(caches[0], labels, batch, trained)


def later_over_first(cost: Callable[[Callable[[], None]], float], *arguments: Any) -> float:
    """Return the cost of a later epoch divided by that of the first."""
    first, later = epochs(*arguments)
    first_cost = cost(first)
    return cost(later) / first_cost


def seconds(run: Callable[[], None]) -> float:
    """Time a run in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(size: int, images: int, batch: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure ResNet-50 with adapters in its last stage and in its last block, and with a side network beside it."""
    x, labels = torch.randn(images, 3, size, size, device=device), torch.arange(images, device=device) % 10
    methods = (
        (visadapt.Bottleneck(m=32), "layer4", "last stage adapted"),
        (visadapt.Bottleneck(m=32), slice(-1, None), "last block adapted"),
        (visadapt.Ladder(), None, "ladder"),
    )
    for method, where, part in methods:
        setting = f"ResNet-50, m={method.m}, {images} images, batch {batch}, {size} px, {OPTIMISER}"
        arguments = (method, where, x, labels, batch)
        figure = f"a later epoch on the prefix cache / the first ({part})"
        yield exact(f"operations: {figure}", setting, later_over_first(operations, *arguments))
        ratios = [later_over_first(seconds, *arguments) for _ in range(repeats)]
        yield spread(f"prefix cache: a later epoch / the first ({part})", setting, ratios, "×")
        first, later = epochs(*arguments)
        first()
        yield from profile(f"a later epoch on the prefix cache, {part}", setting, later)


if __name__ == "__main__":
    args = parse_args(__doc__, size=96, images=64, batch=16, repeats=3)
    print_rows(measure(args.size, args.images, args.batch, args.repeats, args.device))
