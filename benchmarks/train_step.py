"""A training step of ResNet-50: adapters on the lean backbone / full fine-tuning and peft's LoRA, in fp32 and bfloat16.

python -m benchmarks.train_step --size 96
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import visadapt
from benchmarks.measure import (
    OPTIMISER,
    Row,
    Step,
    best,
    bytes_kept,
    exact,
    in_new_process,
    interleaved,
    operations,
    parse_args,
    peak_bytes,
    print_rows,
    profile,
    ratio,
    resnet50,
)
from visadapt.experiments.machine import computes_in_bf16

CLASSES, M = 10, 32
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def adapted(net: nn.Module, norms: str, **lean: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """Inject a bottleneck after every block, lean; return the model and its trained parameters."""
    visadapt.inject(net, m=M, task="t", num_classes=CLASSES, norms=norms)
    return visadapt.lean(net, **lean), visadapt.parameters(net, "t")


def ladder(net: nn.Module, **lean: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """Put a side network of width 64 beside the backbone, lean; return the model and its trained parameters."""
    visadapt.inject(net, visadapt.Ladder(), task="t", num_classes=CLASSES)
    return visadapt.lean(net, **lean), visadapt.parameters(net, "t")


def full(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Replace the head; return the model and all its parameters, for full fine-tuning with BatchNorm in train mode."""
    net.fc = nn.Linear(net.fc.in_features, CLASSES, device=net.fc.weight.device)
    return net, list(net.parameters())


def lora(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Add peft's LoRA to the 3×3 convs, at the rank with the number of parameters nearest to the adapters'."""
    from peft import LoraConfig, get_peft_model

    count = sum(p.numel() for p in adapted(copy.deepcopy(net), "frozen")[1])
    net.fc = nn.Linear(net.fc.in_features, CLASSES, device=net.fc.weight.device)
    convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    each = sum(m.in_channels * 9 + m.out_channels for m in map(net.get_submodule, convs))
    model = get_peft_model(net, LoraConfig(r=max(1, round(count / each)), target_modules=convs, modules_to_save=["fc"]))
    return model, [p for p in model.parameters() if p.requires_grad]


Make = Callable[[nn.Module], tuple[nn.Module, list[nn.Parameter]]]

CONTENDERS: dict[str, Make] = {
    "full fine-tuning": full,
    "bottleneck": partial(adapted, norms="frozen"),
    "bottleneck, bfloat16 kept": partial(adapted, norms="frozen", keep=torch.bfloat16),
    "bottleneck, own norms": partial(adapted, norms="affine"),
    "bottleneck, own norms, bfloat16 kept": partial(adapted, norms="affine", keep=torch.bfloat16),
    "ladder": ladder,
    "peft LoRA": lora,
    "full fine-tuning, bfloat16": full,
    "bottleneck, bfloat16": partial(adapted, norms="frozen", compute=torch.bfloat16, keep=torch.bfloat16),
    "bottleneck, bfloat16 of int8": partial(
        adapted, norms="frozen", compute=torch.bfloat16, keep=torch.bfloat16, weights="int8"
    ),
    "ladder, bfloat16": partial(ladder, compute=torch.bfloat16),
    "peft LoRA, bfloat16": lora,
}
"""By name; fine-tuning and LoRA in bfloat16 run under autocast."""

AUTOCAST = ("full fine-tuning, bfloat16", "peft LoRA, bfloat16")

IN_BF16 = tuple(name for name in CONTENDERS if name.endswith((", bfloat16", ", bfloat16 of int8")))
"""Timed only where the device has instructions for it."""

PRECISIONS = {name: (name, f"{name}, bfloat16") for name in ("full fine-tuning", "bottleneck", "ladder", "peft LoRA")}
"""What may be chosen from where each takes its best format and precision."""


def step(name: str, memory_format: str, size: int, batch: int, device: str) -> tuple[Step, torch.Tensor]:
    """Build one contender's training step on random images; return it and the images."""
    chosen = FORMATS[memory_format]
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size).to(device, memory_format=chosen)
    net = resnet50().to(device, memory_format=chosen)
    model, parameters = CONTENDERS[name](net)
    labels = torch.arange(batch, device=device) % CLASSES
    return Step(model, parameters, lambda net: net(x), labels, name in AUTOCAST), x


def peak(name: str, size: int, batch: int, device: str) -> int:
    """Measure the peak bytes of training: model, gradients, optimiser state and everything that a step keeps."""

    def train() -> None:
        run, _ = step(name, "channels_last", size, batch, device)
        run()
        run()

    return peak_bytes(train, device)


def measure(size: int, batch: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure all figures for one image size."""
    setting = f"ResNet-50, m={M}, batch {batch}, {size} px, {OPTIMISER}"
    names = [name for name in CONTENDERS if "peft" not in name or importlib.util.find_spec("peft")]
    kept = {}
    for name in names:
        made, x = step(name, "channels_last", size, batch, device)
        kept[name] = bytes_kept(made.model, made.loss, [x])
    for name in names[1:]:
        yield exact(f"bytes kept: {name} / full fine-tuning", setting, kept[name] / kept["full fine-tuning"])
    counted = {name: operations(step(name, "contiguous", size, 2, device)[0]) for name in names}
    for name in names[1:]:
        yield exact(f"operations: {name} / full fine-tuning", setting, counted[name] / counted["full fine-tuning"])
    peaks = {name: in_new_process(peak, name, size, batch, device) for name in names[:2]}
    yield exact("peak memory: bottleneck / full fine-tuning", setting, peaks["bottleneck"] / peaks["full fine-tuning"])
    names = [name for name in names if name not in IN_BF16 or computes_in_bf16(device)]
    steps = {f"{name}, {kind}": step(name, kind, size, batch, device)[0] for name in names for kind in FORMATS}
    times = interleaved(steps, repeats, device)
    for kind in FORMATS:
        for name in names[1:]:
            figure = f"step: {name} / full fine-tuning, both {kind}"
            yield ratio(figure, setting, times, f"{name}, {kind}", f"full fine-tuning, {kind}")
    quickest = {name: best(times, [f"{name}, {kind}" for kind in FORMATS]) for name in names}
    for name in names[1:]:
        figure = f"step: {name} / full fine-tuning, each in its best format"
        yield ratio(figure, setting, times, quickest[name], quickest["full fine-tuning"])
    for name in names:
        if name in ("bottleneck", "bottleneck, bfloat16", "ladder, bfloat16"):
            yield from profile(name, f"{setting}, {quickest[name]}", steps[quickest[name]])
    finest = {
        name: best(times, [quickest[each] for each in of_each if each in names])
        for name, of_each in PRECISIONS.items()
        if name in names
    }
    for name in finest:
        if name != "full fine-tuning":
            figure = f"step: {name} / full fine-tuning, each in its best format and precision"
            at = f"{setting}: {finest[name]} / {finest['full fine-tuning']}"
            yield ratio(figure, at, times, finest[name], finest["full fine-tuning"])
    if "peft LoRA" in names:
        counts = " / ".join(f"{steps[f'{name}, contiguous'].trained:,}" for name in ("bottleneck", "peft LoRA"))
        figure = "step: bottleneck / peft LoRA, each in its best format"
        yield ratio(figure, f"{setting}, {counts} trained", times, quickest["bottleneck"], quickest["peft LoRA"])
        figure = "step: bottleneck / peft LoRA, each in its best format and precision"
        yield ratio(figure, f"{setting}, {counts} trained", times, finest["bottleneck"], finest["peft LoRA"])


if __name__ == "__main__":
    args = parse_args(__doc__, size=96, batch=16, repeats=5)
    print_rows(measure(args.size, args.batch, args.repeats, args.device))
