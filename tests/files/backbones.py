"""Define small backbones whose weights are a closed form of their names, the same bits on every machine.

The task files beside this module were written on these backbones and know them by a hash of their weights. Torch does
not promise that a seed gives the same numbers in its next version; integer arithmetic does. Nothing here may change.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spread(name: str, *shape: int) -> Tensor:
    """Return float32 values in [−½, ½) that depend on the name and the shape only: multiples of 2⁻¹², so exact."""
    count = torch.Size(shape).numel()
    x = (torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        # below 2³² times below 2³¹ does not overflow an int64
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = (x ^ (x >> 15)) >> 20
    return (x.to(torch.float32) / 2**12 - 0.5).view(shape)


def weights(name: str, shape: torch.Size) -> Tensor:
    """Return values at the scale that a tensor of this name needs for outputs of every layer to stay near 1."""
    u, last = spread(name, *shape), name.rpartition(".")[2]
    if last == "running_var":
        return 1 + u / 2
    if len(shape) < 2:
        return 1 + u if last in ("weight", "gamma", "scale") else u / 4
    # a power of two, so that the product is exact
    return u * 2.0 ** (2 - shape[1:].numel().bit_length() // 2)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], scale: float = 1.0) -> None:
    """Set each floating point tensor in place to its closed form; matrices and kernels are multiplied by ``scale``."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor.copy_(weights(name, tensor.shape) * (scale if tensor.ndim > 1 else 1))


class Residual(nn.Module):
    """x + norm(second(relu(first(x)))), with grouped 3×3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(F.relu(self.first(x)))))


class Mixer(nn.Module):
    """x + MLP(norm(x)) on a map with channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.gelu(self.first(self.norm(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


class HomeMade(nn.Module):
    """A network of no known family, whose sites are found by tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Residual(8), Mixer(8), Residual(8)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, stem_type="deep", stem_width=4, channels=(4, 8, 8, 8))


def vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    # the 120 million parameters of the two hidden linears are never given memory
    with torch.device("meta"):
        model = VGG(nn.Sequential(), init_weights=False)
    model.features = make_layers([4, "M", 8, "M", 8, "M"], batch_norm=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
    return model


def convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, num_classes=5, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=12,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=8, n_layer=2, n_head=2, num_labels=3, **special)
    return GPT2ForSequenceClassification(config)


def images(count: int = 3) -> dict[str, Tensor]:
    """Return inputs of the backbones that take images, ``(count, 3, 32, 32)``, of squares large enough to be seen."""
    squares = 4 * spread("images", count, 3, 4, 4)
    return {"x": squares.repeat_interleave(8, 2).repeat_interleave(8, 3)}


def tokens() -> dict[str, Tensor]:
    """Return inputs of the backbones that take texts: three of nine tokens, the last padded after six."""
    ids = 1 + (spread("tokens", 3, 9) + 0.5).mul(39).long()
    mask = torch.ones_like(ids)
    ids[2, 6:] = mask[2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Backbone:
    """One backbone.

    Attributes:
        build: makes it; the weights do not matter.
        inputs: makes the batch that it is run on.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]] = field(default=images)

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return it in eval mode, with its weights."""
        model = self.build().eval()
        fill(model.state_dict())
        return model.to(dtype)


BACKBONES = {
    "resnet": Backbone(resnet),
    "vgg": Backbone(vgg),
    "convnext": Backbone(convnext),
    "vit": Backbone(vit),
    "home-made": Backbone(HomeMade),
    "bert": Backbone(bert, tokens),
    "gpt2": Backbone(gpt2, tokens),
}


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits in float32; images are given in the backbone's dtype."""
    dtype = next(model.parameters()).dtype
    given: Any = inputs["x"].to(dtype) if "x" in inputs else None
    out = model(**inputs) if given is None else model(given)
    return getattr(out, "logits", out).float()
