"""What many tasks on one backbone cost, and what training one task does to another, beside peft's LoRA.

python -m benchmarks.why

Writes benchmarks/results/why.csv. Bytes are those of the tensors in memory. The change of task a is the norm
of the difference of its logits on the same test images before and after task b was trained in train mode, relative to
the norm before.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import visadapt
from visadapt.data import load_images, normalize
from visadapt.data.weights import resnet50

RESULTS = Path(__file__).parent / "results" / "why.csv"
TASKS = 100
STEPS = 20


def size(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of distinct tensors."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def tensors(model: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def memory() -> Iterator[tuple[str, str, str]]:
    """Count the bytes of one backbone with many tasks, and of a fine-tuned network per task."""
    model = resnet50()
    one = size(tensors(model))
    for i in range(TASKS):
        visadapt.inject(model, m=8, task=f"task{i}", num_classes=10)
    yield f"{TASKS} tasks, Bottleneck(m=8), one ResNet-50", f"{size(tensors(model)) / 2**20:.0f}", "MiB"
    yield f"{TASKS} fine-tuned ResNet-50", f"{TASKS * one / 2**30:.1f}", "GiB"


def train(model: nn.Module, parameters: Iterable[nn.Parameter], images: Tensor, labels: Tensor) -> None:
    """Train for some steps in train mode."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    for rows in torch.arange(16 * STEPS).split(16):
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def change(model: nn.Module, choose: Callable[[str], object], parameters: Callable[[], Iterable[nn.Parameter]]) -> str:
    """Train task b, and return the relative change of task a's logits."""
    data = load_images("cifar10")
    images, test = normalize(data.train.images[: 16 * STEPS], 64), normalize(data.test.images[:64], 64)
    choose("a")
    with torch.no_grad():
        before = model.eval()(test)
    choose("b")
    train(model, parameters(), images, data.train.labels[: 16 * STEPS])
    choose("a")
    with torch.no_grad():
        after = model(test)
    return f"{(after - before).norm() / before.norm():.2f}"


def disturbance() -> Iterator[tuple[str, str, str]]:
    """Measure what training task b does to task a, here and in peft."""
    torch.manual_seed(0)
    model = resnet50()
    for task in "ab":
        visadapt.inject(model, m=8, task=task, num_classes=10)
    moved = change(model, lambda task: visadapt.activate(model, task), lambda: visadapt.parameters(model, "b"))
    yield "relative change of task a's logits by training b, visadapt", moved, ""
    torch.manual_seed(0)
    net = resnet50()
    convs = [name for name, module in net.named_modules() if getattr(module, "kernel_size", 0) == (3, 3)]
    config = peft.LoraConfig(r=8, target_modules=convs)
    other = peft.get_peft_model(net, config, adapter_name="task a")
    other.add_adapter("task b", config)
    moved = change(
        other,
        lambda task: other.set_adapter(f"task {task}"),
        lambda: [p for p in other.parameters() if p.requires_grad],
    )
    yield f"relative change of task a's logits by training b, peft {peft.__version__} LoRA", moved, ""


def main() -> None:
    rows = [*memory(), *disturbance()]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("figure", "value", "unit"), *rows])
    print(RESULTS.read_text(encoding="utf-8"), file=sys.stdout)


if __name__ == "__main__":
    main()
