"""A forward pass of ResNet-50 without gradients: merged and folded, or with adapters / the plain backbone in fp32.

python -m benchmarks.inference
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import visadapt
from benchmarks.measure import Row, best, exact, interleaved, operations, parse_args, print_rows, ratio, resnet50

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def merged(net: nn.Module) -> nn.Module:
    """Inject parallel adapters, merge them into the kernels, and fold the norms that follow."""
    visadapt.inject(net, visadapt.Parallel(), task="t", num_classes=1000)
    return visadapt.merge(net, "t", fold=True)


def unmerged(net: nn.Module, norms: str, lean: bool, compute: torch.dtype | None = None) -> nn.Module:
    """Inject a bottleneck of width 32 after every block."""
    visadapt.inject(net, m=32, task="t", num_classes=1000, norms=norms)
    return visadapt.lean(net, compute=compute) if lean else net


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain backbone": lambda net: net,
    "merged and folded": merged,
    "bottleneck m=32": lambda net: unmerged(net, "affine", False),
    "bottleneck m=32, own norms, lean": lambda net: unmerged(net, "affine", True),
    "bottleneck m=32, lean": lambda net: unmerged(net, "frozen", True),
    "merged and folded, bfloat16": lambda net: merged(net).to(torch.bfloat16),
    "bottleneck m=32, lean, bfloat16": lambda net: unmerged(net, "frozen", True, torch.bfloat16),
}


def measure(size: int, batch: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure all figures."""
    setting = f"ResNet-50, batch {batch}, {size} px"
    net, x = resnet50(), torch.randn(batch, 3, size, size)
    runs: dict[str, Callable[[], object]] = {}
    for name, make in CONTENDERS.items():
        for kind, chosen in FORMATS.items():
            model = make(copy.deepcopy(net)).eval().to(device, memory_format=chosen)
            given = x.to(device, next(iter(model.state_dict().values())).dtype, memory_format=chosen)
            runs[f"{name}, {kind}"] = partial(model, given)
    with torch.no_grad():
        counted = {name: operations(run) for name, run in runs.items()}
        times = interleaved(runs, repeats, device)
    quickest = {name: best(times, [f"{name}, {kind}" for kind in FORMATS]) for name in CONTENDERS}
    for name in list(CONTENDERS)[1:]:
        share = counted[f"{name}, contiguous"] / counted["plain backbone, contiguous"]
        yield exact(f"operations: {name} / plain backbone", setting, share)
        for kind in FORMATS:
            figure = f"inference: {name} / plain backbone, both {kind}"
            yield ratio(figure, setting, times, f"{name}, {kind}", f"plain backbone, {kind}")
        figure = f"inference: {name} / plain backbone, each in its best format"
        yield ratio(figure, setting, times, quickest[name], quickest["plain backbone"])


if __name__ == "__main__":
    args = parse_args(__doc__, size=224, batch=8, repeats=7)
    print_rows(measure(args.size, args.batch, args.repeats, args.device))
