"""What a training step costs: adapters on a frozen ResNet-50, lean and plain, over full fine-tuning.

python benchmarks/train_step.py --size 96 --batch 16
python benchmarks/train_step.py --size 96 --batch 16 --peft    # needs peft: LoRA with as many trained parameters
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt

CLASSES = 10


def adapted(net: nn.Module, norms: str, lean: bool, m: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """A bottleneck of width m after every block, and what it trains."""
    visadapt.inject(net, m=m, task="t", num_classes=CLASSES, norms=norms)
    if lean:
        visadapt.lean(net)
    return net, visadapt.parameters(net, "t")


def full(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Ordinary fine-tuning: every weight, BatchNorm in train mode."""
    net.fc = nn.Linear(net.fc.in_features, CLASSES)
    return net, list(net.parameters())


def lora(net: nn.Module, count: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """peft's LoRA on the 3×3 convs, at the rank whose parameters come nearest to ``count``."""
    from peft import LoraConfig, get_peft_model

    net.fc = nn.Linear(net.fc.in_features, CLASSES)
    convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    each = sum(m.in_channels * 9 + m.out_channels for m in map(net.get_submodule, convs))
    model = get_peft_model(net, LoraConfig(r=max(1, round(count / each)), target_modules=convs, modules_to_save=["fc"]))
    return model, [p for p in model.parameters() if p.requires_grad]


class Step:
    """One contender: forward, backward and an AdamW step on the same batch."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.trained = sum(p.numel() for p in parameters)
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimiser.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def kept(self) -> int:
        """Bytes that autograd keeps for the backward pass, beside parameters, buffers and the batch."""
        held = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), self.x)}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        # what the lean functions keep is no saved tensor of autograd's
        return sum(found.values()) + _hidden(loss.grad_fn)


def _hidden(root: object) -> int:
    """Bytes that custom autograd functions hold as attributes."""
    total, seen, stack = 0, set(), [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in ("bits", "indices"):
            value = getattr(node, name, None)
            if isinstance(value, Tensor):
                total += value.untyped_storage().nbytes()
        stack.extend(following for following, _ in node.next_functions)  # type: ignore[attr-defined]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--m", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--out", type=Path, help="a CSV file to write as well")
    given = parser.parse_args()
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None)
    x = torch.randn(given.batch, 3, given.size, given.size, device=given.device)
    y = torch.arange(given.batch, device=given.device) % CLASSES
    memory_format = torch.channels_last if given.channels_last else torch.contiguous_format
    makers: dict[str, Callable[[nn.Module], tuple[nn.Module, list[nn.Parameter]]]] = {
        "full fine-tuning": full,
        "bottleneck, norms frozen": lambda n: adapted(n, "frozen", False, given.m),
        "bottleneck, norms frozen, lean": lambda n: adapted(n, "frozen", True, given.m),
        "bottleneck, norms affine": lambda n: adapted(n, "affine", False, given.m),
        "bottleneck, norms affine, lean": lambda n: adapted(n, "affine", True, given.m),
    }
    if given.peft:
        count = sum(p.numel() for p in adapted(copy.deepcopy(net), "frozen", False, given.m)[1])
        makers["peft LoRA, 3×3 convs"] = lambda n: lora(n, count)
    steps = {}
    for name, make in makers.items():
        model, parameters = make(copy.deepcopy(net).to(given.device, memory_format=memory_format))
        steps[name] = Step(model, parameters, x.to(memory_format=memory_format), y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 1):
        for name, step in steps.items():
            taken = step.run()
            if repeat:
                times[name].append(taken)
    whole, kept = times["full fine-tuning"], {name: step.kept() for name, step in steps.items()}
    rows = [
        (
            "contender",
            "device",
            "torch",
            "format",
            "size",
            "batch",
            "trained",
            "median_ms",
            "time / full",
            "kept_MB",
            "kept / full",
        )
    ]
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, whole, strict=True))
        device = torch.cuda.get_device_name() if x.is_cuda else f"cpu, {torch.get_num_threads()} threads"
        rows.append(
            (
                name,
                device,
                torch.__version__,
                str(memory_format).removeprefix("torch."),
                given.size,
                given.batch,
                steps[name].trained,
                f"{1e3 * statistics.median(each):.0f}",
                f"{ratio:.2f}",
                f"{kept[name] / 1e6:.1f}",
                f"{kept[name] / kept['full fine-tuning']:.2f}",
            )
        )
    csv.writer(sys.stdout).writerows(rows)
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
