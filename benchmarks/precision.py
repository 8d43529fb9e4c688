"""A backbone kept in fewer bytes beside fp32: accuracy, outputs and memory, of tasks trained on bundled data.

python -m benchmarks.precision
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import visadapt
from benchmarks.measure import Row, exact, parse_args, print_rows
from visadapt.backbone.modules import own_modules
from visadapt.backbone.stored_values import plain_tensors
from visadapt.experiments import ImageProblem, TextProblem
from visadapt.training import Recipe, fit

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"compute": torch.bfloat16},
    "int8": {"weights": "int8"},
    "bfloat16 of int8": {"compute": torch.bfloat16, "weights": "int8"},
}


@torch.no_grad()
def logits_of(model: nn.Module, problem: ImageProblem | TextProblem, device: str, batch: int = 50) -> Tensor:
    """Compute the logits of all test samples, on the CPU."""
    data = problem.splits.test
    model.eval()
    found = []
    for rows in torch.arange(len(data)).split(batch):
        inputs = problem.prepare(data.take(rows)[0])
        if isinstance(inputs, Tensor):
            out: Any = model(inputs.to(device))
        else:
            out = model(**{name: column.to(device) for name, column in inputs.items()})
        found.append((out if isinstance(out, Tensor) else out.logits).float().cpu())
    return torch.cat(found)


def memory(model: nn.Module) -> int:
    """Sum the bytes of the backbone's parameters and buffers, without those of tasks."""
    held: dict[int, int] = {}
    for module in own_modules(model).values():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for plain in () if tensor is None else plain_tensors(tensor, ""):
                held[plain.data_ptr()] = plain.numel() * plain.element_size()
    return sum(held.values())


def compare(problem: ImageProblem | TextProblem, epochs: int, device: str) -> Iterator[Row]:
    """Train a bottleneck in fp32, and answer the test samples in each precision."""
    model = problem.fresh()
    data = problem.splits
    visadapt.inject(model, m=8, task="t", num_classes=len(data.classes), norms="frozen")
    recipe = Recipe(epochs=epochs, lr=3e-3, batch_size=32)
    fit(model, "t", data.train, recipe=recipe, prepare=problem.prepare, seed=0, device=device)
    setting = (
        f"{problem.backbone}, m=8, {problem.data}, {len(data.train):,} training and {len(data.test):,} test samples"
    )
    plain, whole = torch.empty(0), 1
    labels = data.test.labels
    assert labels is not None
    for name, options in PRECISIONS.items():
        if options:
            visadapt.lean(model, **options)
        logits, held = logits_of(model, problem, device), memory(model)
        if options:
            visadapt.unlean(model)
        else:
            plain, whole = logits, held
        answers = logits.argmax(1)
        yield exact(f"precision: accuracy, {name}", setting, 100 * float((answers == labels).float().mean()), "%")
        if options:
            other = 100 * float((answers != plain.argmax(1)).float().mean())
            yield exact(f"precision: other answers than float32, {name}", setting, other, "%")
            apart = float((logits - plain).abs().max() / plain.std())
            figure = f"precision: largest difference of a logit / standard deviation of logits, {name}"
            yield exact(figure, setting, apart)
            yield exact(f"precision: memory of the backbone, {name} / float32", setting, held / whole)


def measure(train: int, test: int, epochs: int, device: str) -> Iterator[Row]:
    """Measure a ResNet-50 on images and MiniLM on texts."""
    sizes = {"train": train, "validation": 100, "test": test}
    yield from compare(ImageProblem("bundled/resnet50", "cifar10", **sizes, size=64), epochs, device)
    yield from compare(TextProblem("bundled/minilm", "tweets", **sizes, length=32), epochs, device)


if __name__ == "__main__":
    args = parse_args(__doc__, train=500, test=500, epochs=2, repeats=1)
    print_rows(measure(args.train, args.test, args.epochs, args.device))
