"""Every method, in every form that makes a difference, and where it can stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import visadapt as v


@dataclass(frozen=True)
class Case:
    """One method as a test puts it in.

    Attributes:
        method: with options.
        images: whether it can stand in the convolutional members.
        text: whether it can stand in the Transformers.
        near: 0 where it promises to start as the backbone bit for bit; else how far it may be off.
        options: of ``inject``.
    """

    method: v.Method
    images: bool = True
    text: bool = False
    near: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def put(self, model: Any, task: str = "task", num_classes: int | None = 5, **options: Any) -> Any:
        """Injects it, with a new head unless told otherwise."""
        return v.inject(model, self.method, task=task, num_classes=num_classes, **{**self.options, **options})

    def suits(self, member: Any) -> bool:
        """Whether it can stand in a member of the zoo."""
        if (
            isinstance(self.method, v.ConvAdapter)
            and self.method.scheme == "residual-parallel"
            and "vgg" in member.name
        ):
            return False  # a VGG has no branches
        if isinstance(self.method, v.CoLoRA):
            return member.name == "timm/resnet26t"  # the one with bottleneck blocks that are not grouped
        return self.text if member.text else self.images


CASES = {
    "bottleneck": Case(v.Bottleneck(m=2), text=True),
    "adapter-plus": Case(v.Bottleneck(m=2, scale="channel", drop_path=0.1), text=True),
    "parallel": Case(v.Parallel()),
    "parallel-low-rank": Case(v.Parallel(rank=2, dropout=0.2)),
    "parallel-of-linears": Case(v.Parallel(rank=2), images=False, text=True, options={"where": "query"}),
    "series": Case(v.Series()),
    "series-without-norm": Case(v.Series(norm=False)),
    "tsa": Case(v.TSA(align=True), near=0.05, options={"norms": "frozen"}),
    "dan": Case(v.DAN()),
    "dan-diagonal": Case(v.DAN(diagonal=True)),
    "dan-6-bits": Case(v.DAN(bits=6)),
    "dan-of-linears": Case(v.DAN(), images=False, text=True, options={"where": ["query", "value"]}),
    "conv-parallel": Case(v.ConvAdapter()),
    "conv-sequential": Case(v.ConvAdapter(scheme="conv-sequential")),
    "residual-parallel": Case(v.ConvAdapter(scheme="residual-parallel")),
    "residual-sequential": Case(v.ConvAdapter(scheme="residual-sequential")),
    "ssf": Case(v.SSF(), text=True),
    "lora": Case(v.LoRA(r=2, alpha=4), text=True),
    "dora": Case(v.DoRA(r=2, alpha=4), text=True),
    "colora": Case(v.CoLoRA(r=3), images=False),
    "adaptformer": Case(v.AdaptFormer(m=2), images=False, text=True),
    "mona": Case(v.Mona(m=2)),
    "ladder": Case(v.Ladder(m=2), text=True, options={"norms": "frozen"}),
    "linear": Case(v.Linear(), text=True, options={"norms": "frozen"}),
    "norms": Case(v.Norms(), text=True, options={"norms": "full"}),
    "biases": Case(v.Biases(), text=True, options={"norms": "frozen"}),
    "top-layers": Case(v.TopLayers(1), text=True),
    "full": Case(v.Full(), text=True),
}

MEMBERS = (
    "tiny/resnet",
    "transformers/bert",
    "transformers/distilbert",
    "torchvision/resnet18",
    "timm/resnet26t",
    "timm/resnext50_32x4d",
    "timm/vgg11_bn",
)
