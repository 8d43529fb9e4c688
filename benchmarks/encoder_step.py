"""A training step of an encoder of BERT-base's size: bottleneck adapters / full fine-tuning and adapter-hub's adapters.

python -m benchmarks.encoder_step

The adapters library pins transformers 4.57, so it needs its own environment; it is measured where it is installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import visadapt
from benchmarks.measure import (
    OPTIMISER,
    Row,
    Step,
    bytes_kept,
    exact,
    interleaved,
    operations,
    parse_args,
    print_rows,
    profile,
    ratio,
)
from visadapt.experiments.machine import computes_in_bf16

M = 64


def adapted(net: nn.Module, norms: str, **lean: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """Inject Houlsby's two adapters per layer, lean; return the model and its trained parameters."""
    visadapt.inject(net, m=M, task="t", norms=norms)
    return visadapt.lean(net, **lean), visadapt.parameters(net, "t")


def full(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return the model and all its parameters, for full fine-tuning."""
    return net, list(net.parameters())


def adapter_hub(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Add the same adapters with adapter-hub's library; return the model and its trained parameters."""
    import adapters

    adapters.init(net)
    config = adapters.DoubleSeqBnConfig(reduction_factor=net.config.hidden_size / M, non_linearity="gelu")
    net.add_adapter("t", config=config)
    net.train_adapter("t")
    return net, [p for p in net.parameters() if p.requires_grad]


CONTENDERS = {
    "full fine-tuning": full,
    "bottleneck": lambda net: adapted(net, "frozen"),
    "bottleneck, own norms": lambda net: adapted(net, "affine"),
    "bottleneck, own norms, bfloat16 kept": lambda net: adapted(net, "affine", keep=torch.bfloat16),
    "adapter-hub": adapter_hub,
    "full fine-tuning, bfloat16": full,
    "bottleneck, bfloat16": lambda net: adapted(net, "frozen", compute=torch.bfloat16, keep=torch.bfloat16),
}


def measure(batch: int, length: int, layers: int, repeats: int, device: str) -> Iterator[Row]:
    """Measure all figures."""
    setting = f"{layers} layers of BERT-base, m={M}, batch {batch}, {length} tokens, {OPTIMISER}"
    net = BertForSequenceClassification(BertConfig(num_hidden_layers=layers))
    tokens = torch.randint(1000, 30000, (batch, length), device=device)
    mask = torch.ones_like(tokens)
    labels = torch.arange(batch, device=device) % 2
    names = [name for name in CONTENDERS if name != "adapter-hub" or importlib.util.find_spec("adapters")]
    steps = {}
    for name in names:
        model, parameters = CONTENDERS[name](copy.deepcopy(net).to(device))
        autocast = name == "full fine-tuning, bfloat16"
        steps[name] = Step(model, parameters, lambda net: net(tokens, attention_mask=mask).logits, labels, autocast)
    kept = {name: bytes_kept(step.model, step.loss, [tokens, mask]) for name, step in steps.items()}
    for name in names[1:]:
        yield exact(f"bytes kept: {name} / full fine-tuning, BERT", setting, kept[name] / kept["full fine-tuning"])
    counted = {name: operations(run) for name, run in steps.items()}
    for name in names[1:]:
        yield exact(
            f"operations: {name} / full fine-tuning, BERT", setting, counted[name] / counted["full fine-tuning"]
        )
    if not computes_in_bf16(device):
        names = [name for name in names if not name.endswith(", bfloat16")]
    times = interleaved({name: steps[name] for name in names}, repeats, device)
    yield from profile("bottleneck, BERT", setting, steps["bottleneck"])
    for name in names[1:]:
        yield ratio(f"step: {name} / full fine-tuning, BERT", setting, times, name, "full fine-tuning")
    if "bottleneck, bfloat16" in names:
        figure = "step: bottleneck / full fine-tuning, both bfloat16, BERT"
        yield ratio(figure, setting, times, "bottleneck, bfloat16", "full fine-tuning, bfloat16")
    if "adapter-hub" in names:
        for name in ("bottleneck", "bottleneck, own norms"):
            trained = f"{steps[name].trained:,} / {steps['adapter-hub'].trained:,} trained"
            yield ratio(f"step: {name} / adapter-hub, BERT", f"{setting}, {trained}", times, name, "adapter-hub")


if __name__ == "__main__":
    args = parse_args(__doc__, batch=8, length=128, layers=12, repeats=5)
    print_rows(measure(args.batch, args.length, args.layers, args.repeats, args.device))
