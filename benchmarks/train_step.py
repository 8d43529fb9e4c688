"""A training step of ResNet-50: bottleneck adapters on the lean backbone / full fine-tuning and peft's LoRA.

python -m benchmarks.train_step --size 96
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator

import torch
import torchvision
from torch import nn

import visadapt
from benchmarks.measure import (
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
)

CLASSES, M = 10, 32
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def adapted(net: nn.Module, norms: str, keep: torch.dtype | None = None) -> tuple[nn.Module, list[nn.Parameter]]:
    """Inject a bottleneck after every block, lean; return the model and its trained parameters."""
    visadapt.inject(net, m=M, task="t", num_classes=CLASSES, norms=norms)
    return visadapt.lean(net, keep=keep), visadapt.parameters(net, "t")


def full(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Replace the head; return the model and all its parameters, for full fine-tuning with BatchNorm in train mode."""
    net.fc = nn.Linear(net.fc.in_features, CLASSES)
    return net, list(net.parameters())


def lora(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Add peft's LoRA to the 3×3 convs, at the rank with the number of parameters nearest to the adapters'."""
    from peft import LoraConfig, get_peft_model

    count = sum(p.numel() for p in adapted(copy.deepcopy(net), "frozen")[1])
    net.fc = nn.Linear(net.fc.in_features, CLASSES)
    convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    each = sum(m.in_channels * 9 + m.out_channels for m in map(net.get_submodule, convs))
    model = get_peft_model(net, LoraConfig(r=max(1, round(count / each)), target_modules=convs, modules_to_save=["fc"]))
    return model, [p for p in model.parameters() if p.requires_grad]


CONTENDERS = {
    "full fine-tuning": full,
    "bottleneck": lambda net: adapted(net, "frozen"),
    "bottleneck, bfloat16 kept": lambda net: adapted(net, "frozen", torch.bfloat16),
    "bottleneck, own norms": lambda net: adapted(net, "affine"),
    "bottleneck, own norms, bfloat16 kept": lambda net: adapted(net, "affine", torch.bfloat16),
    "peft LoRA": lora,
}


def step(name: str, memory_format: str, size: int, batch: int, device: str) -> tuple[Step, torch.Tensor]:
    """Build one contender's training step on random images; return it and the images."""
    chosen = FORMATS[memory_format]
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size).to(device, memory_format=chosen)
    net = torchvision.models.resnet50(weights=None).to(device, memory_format=chosen)
    model, parameters = CONTENDERS[name](net)
    labels = torch.arange(batch, device=device) % CLASSES
    return Step(model, parameters, lambda net: net(x), labels), x


def peak(name: str, size: int, batch: int, device: str) -> int:
    """Measure the peak bytes of training: model, gradients, optimiser state and everything that a step keeps."""

    def train() -> None:
        run, _ = step(name, "channels_last", size, batch, device)
        run()
        run()

    return peak_bytes(train, device)


def measure(size: int, batch: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure all figures for one image size."""
    setting = f"ResNet-50, m={M}, batch {batch}, {size} px"
    names = [name for name in CONTENDERS if name != "peft LoRA" or importlib.util.find_spec("peft")]
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
    yield from profile("bottleneck", f"{setting}, {quickest['bottleneck']}", steps[quickest["bottleneck"]])
    if "peft LoRA" in names:
        counts = " / ".join(f"{steps[f'{name}, contiguous'].trained:,}" for name in ("bottleneck", "peft LoRA"))
        figure = "step: bottleneck / peft LoRA, each in its best format"
        yield ratio(figure, f"{setting}, {counts} trained", times, quickest["bottleneck"], quickest["peft LoRA"])


if __name__ == "__main__":
    args = parse_args(__doc__, size=96, batch=16, repeats=5)
    print_rows(measure(args.size, args.batch, args.repeats, args.device))
