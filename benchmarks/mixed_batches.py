"""What a mixed batch costs: n tasks in a batch of n, over the same batch with one task. Ratios of interleaved repeats.

python benchmarks/mixed_batches.py --tasks 8 --size 96
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time

import torch
import torchvision

import visadapt


def build(tasks: int, m: int, norms: str) -> torch.nn.Module:
    """torchvision's ResNet-50 with that many tasks, each with a head of its own, all moved away from the identity."""
    model = torchvision.models.resnet50(weights=None)
    for i in range(tasks):
        visadapt.inject(model, m=m, task=f"task{i}", num_classes=10, norms=norms)
        with torch.no_grad():
            for p in visadapt.parameters(model, f"task{i}"):
                p.add_(torch.randn_like(p), alpha=0.01)
    return model.eval()


@torch.no_grad()
def seconds(model: torch.nn.Module, task: str | list[str] | None, x: torch.Tensor) -> float:
    """One forward."""
    with visadapt.using(model, task):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8, help="number of tasks, and of samples")
    parser.add_argument("--size", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--m", type=int, default=32, help="width of the bottleneck")
    parser.add_argument("--norms", default="affine", choices=("frozen", "affine", "full"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = build(given.tasks, given.m, given.norms).to(given.device)
    x = torch.randn(given.tasks, 3, given.size, given.size, device=given.device)
    if given.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    contenders = {"bare": None, "one task": "task0", "mixed": [f"task{i}" for i in range(given.tasks)]}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(given.repeats + 2):
        for name, task in contenders.items():
            taken = seconds(model, task, x)
            if repeat >= 2:
                times[name].append(taken)
    rows = csv.writer(sys.stdout)
    rows.writerow(("contender", "tasks", "median_ms", "least_ms", "median / one task", "least / one task"))
    one = times["one task"]
    for name, each in times.items():
        ratios = statistics.median(a / b for a, b in zip(each, one, strict=True)), min(each) / min(one)
        middle, least = statistics.median(each), min(each)
        rows.writerow((name, given.tasks, f"{1e3 * middle:.1f}", f"{1e3 * least:.1f}", *(f"{r:.3f}" for r in ratios)))


if __name__ == "__main__":
    main()
