"""Define the tasks of the old files: every method, with each option that changes what a file holds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import visadapt as v
from tests.files.backbones import fill


@dataclass(frozen=True)
class Case:
    """One task file.

    Attributes:
        backbone: a name in ``BACKBONES``.
        methods: what is put in, one after another.
        options: of the first ``inject``.
        also: ``where`` of each further one.
        notes: saved with the task.
        dtype: of the backbone.
        tensors: dtype of the task's tensors; None for what ``inject`` makes.
        alpha: set afterwards, for a DAN.
    """

    backbone: str
    methods: tuple[v.Method, ...]
    options: Mapping[str, Any]
    also: tuple[Any, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tensors: torch.dtype | None = None
    alpha: float | None = None


def on(backbone: str, *methods: v.Method, **options: Any) -> Case:
    """Return a case; what is not a field of it is an option of ``inject``, a new head of three classes by default."""
    own = {name: options.pop(name) for name in ("also", "notes", "dtype", "tensors", "alpha") if name in options}
    head = {} if "head" in options else {"num_classes": 3}
    return Case(backbone, methods, {**head, **options}, **own)


NOTES = {
    "backbone": {"name": "timm/resnet18", "build": {"in_chans": 3}},
    "inputs": {"kind": "images", "size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "by": ["Ada", 1, None, {"größer": True}],
}
FROZEN = {"norms": "frozen", "head": "frozen"}

CASES = {
    "bottleneck": on("resnet", v.Bottleneck(m=3), labels=["rose", "tulip", "Löwenzahn"], notes=NOTES),
    "bottleneck-depthwise": on("resnet", v.Bottleneck(m=0.5, activation="relu", depthwise=True), norms="full"),
    "bottleneck-linear": on("resnet", v.Bottleneck(m=2, activation=None), norms="frozen", head="copy"),
    "bottleneck-near-identity": on("resnet", v.Bottleneck(m=2, activation="tanh", init_std=1e-2), head="frozen"),
    "bottleneck-late": on("resnet", v.Bottleneck(m=2, activation="silu", dropout=0.1), where="layer4", **FROZEN),
    "bottleneck-vgg": on("vgg", v.Bottleneck(m=2)),
    "bottleneck-convnext": on("convnext", v.Bottleneck(m=2), norms="full"),
    "bottleneck-vit": on("vit", v.Bottleneck(m=2)),
    "bottleneck-home-made": on("home-made", v.Bottleneck(m=2), norms="full"),
    "bottleneck-bert": on("bert", v.Bottleneck(m=2), labels=["negative", "neutral", "positive"]),
    "bottleneck-bert-copied-head": on("bert", v.Bottleneck(m=2), head="copy", norms="frozen"),
    "bottleneck-bert-regression": on("bert", v.Bottleneck(m=2), num_classes=1),
    "bottleneck-gpt2": on("gpt2", v.Bottleneck(m=2)),
    "parallel": on("resnet", v.Parallel()),
    "parallel-low-rank": on("resnet", v.Parallel(rank=2, dropout=0.2), norms="full"),
    "parallel-shared-factor": on("resnet", v.Parallel(rank=2, factor_of="parallel-low-rank")),
    "parallel-he": on("vgg", v.Parallel(init="he")),
    "parallel-bert": on("bert", v.Parallel(rank=0.25), where="query"),
    "series": on("resnet", v.Series()),
    "series-without-norm": on("vgg", v.Series(norm=False)),
    "tsa": on("resnet", v.TSA(init=1e-2), norms="frozen"),
    "tsa-aligned": on("resnet", v.TSA(align=True), norms="frozen"),
    "dan": on("resnet", v.DAN()),
    "dan-with-bias": on("vgg", v.DAN()),
    "dan-diagonal": on("resnet", v.DAN(diagonal=True), where="conv"),
    "dan-6-bits": on("resnet", v.DAN(bits=6)),
    "dan-3-bits-diagonal": on("vgg", v.DAN(diagonal=True, bits=3)),
    "dan-mixed": on("resnet", v.DAN(), alpha=0.25, norms="frozen"),
    "dan-bert": on("bert", v.DAN(bits=8), where=["query", "value"]),
    "dan-gpt2": on("gpt2", v.DAN(), where="qkv"),
    "conv-adapter": on("resnet", v.ConvAdapter(gamma=2)),
    "conv-adapter-conv-sequential": on("home-made", v.ConvAdapter(scheme="conv-sequential")),
    "conv-adapter-residual-parallel": on("resnet", v.ConvAdapter(gamma=2, scheme="residual-parallel")),
    "conv-adapter-residual-sequential": on(
        "resnet", v.ConvAdapter(gamma=2, scheme="residual-sequential", init="release")
    ),
    "conv-adapter-convnext": on("convnext", v.ConvAdapter(scheme="residual-sequential")),
    "ssf": on("resnet", v.SSF()),
    "ssf-convnext": on("convnext", v.SSF(init_std=0.02), norms="frozen"),
    "ssf-bert": on("bert", v.SSF(), norms="frozen"),
    "ssf-home-made": on("home-made", v.SSF(), norms="frozen"),
    "lora": on("resnet", v.LoRA(r=2, alpha=4)),
    "lora-grouped": on("home-made", v.LoRA(r=2), where="conv3x3"),
    "lora-bert": on("bert", v.LoRA(r=2, alpha=1, dropout=0.1)),
    "lora-vit": on("vit", v.LoRA(r=0.25)),
    "lora-gpt2": on("gpt2", v.LoRA(r=2)),
    "adaptformer-vit": on("vit", v.AdaptFormer(m=2)),
    "adaptformer-bert": on("bert", v.AdaptFormer(m=2, scale=0.5)),
    "linear": on("resnet", v.Linear(), norms="frozen"),
    "linear-bert": on("bert", v.Linear(), norms="frozen"),
    "norms": on("resnet", v.Norms(), norms="full"),
    "norms-bert": on("bert", v.Norms()),
    "biases": on("resnet", v.Biases(), norms="frozen"),
    "biases-bert": on("bert", v.Biases()),
    "top-layers": on("resnet", v.TopLayers(2)),
    "top-layers-vit": on("vit", v.TopLayers(1), norms="frozen"),
    "full": on("resnet", v.Full(), norms="full"),
    "full-bert": on("bert", v.Full(), norms="frozen", head="frozen"),
    "two-methods": on("resnet", v.Bottleneck(m=2), v.LoRA(r=1), also=("layer3",)),
    "two-methods-bert": on("bert", v.LoRA(r=2), v.AdaptFormer(m=2), v.Biases(), also=(None, None), norms="frozen"),
    "backbone-bfloat16": on("resnet", v.Bottleneck(m=2), norms="full", dtype=torch.bfloat16),
    "backbone-float16": on("bert", v.Bottleneck(m=2), dtype=torch.float16),
    "tensors-bfloat16": on("resnet", v.Bottleneck(m=2), **FROZEN, tensors=torch.bfloat16),
    "tensors-float16": on("bert", v.LoRA(r=2), **FROZEN, tensors=torch.float16),
    "backbone-float64": on("vgg", v.Parallel(), dtype=torch.float64),
}


def task_tensors(model: nn.Module, task: str) -> dict[str, Tensor]:
    """Return the parameters of a task and the buffers that its file holds."""
    saved = model.state_dict()
    own = {name: b for name, b in model.named_buffers() if f"visadapt.{task}." in name and name in saved}
    return {**dict(v.named_parameters(model, task)), **own}


@torch.no_grad()
def put(model: nn.Module, task: str, case: Case) -> None:
    """Put a case into its backbone as a task, and give its tensors values that all outputs depend on."""
    with warnings.catch_warnings():
        # on backbones this small an adapter may well be larger than what it adapts
        warnings.simplefilter("ignore", UserWarning)
        v.inject(model, case.methods[0], task=task, **case.options)
        for method, where in zip(case.methods[1:], case.also, strict=True):
            v.inject(model, method, task=task, where=where, norms=v.tasks(model)[task].norms)
    if case.alpha is not None:
        v.set_alpha(model, task, case.alpha)
    if case.tensors is not None:
        for parameter in v.parameters(model, task):
            parameter.data = parameter.data.to(case.tensors)
    fill({f"{task}.{name}": tensor for name, tensor in task_tensors(model, task).items()}, 0.5)
