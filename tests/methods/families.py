"""Small networks of every build that methods are tested on, and what holds for any method in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import ZOO, Inputs, answer, enliven, stir
from tests.models_nd import ResNet


@dataclass(frozen=True)
class Family:
    """One network.

    Attributes:
        build: makes it, weights as they come.
        shape: of one sample; () for tokens.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)

    def make(self) -> nn.Module:
        """The network in eval mode, with weights that leave no branch dead; the same every time."""
        torch.manual_seed(0)
        return enliven(self.build()).eval()

    def inputs(self, n: int) -> Inputs:
        """A batch of n samples."""
        if not self.shape:
            return ZOO["transformers/bert"].inputs(n=n)
        return {"x": torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0))}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


def _torchvision_vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 48, num_classes=10)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], num_classes=10, layer_scale=0.5)


def _transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=16, num_labels=10, **sizes))


_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}

CONVOLUTIONAL = {
    "tiny/resnet": Family(ZOO["tiny/resnet"].build),
    "tiny/bottleneck-resnet": Family(_timm("resnet26", channels=(8, 12, 16, 20))),
    "tiny/vgg": Family(ZOO["tiny/vgg_bn"].build),
    "timm/convnext": Family(_timm("convnext_atto", **_CONVNEXT)),
    "torchvision/convnext": Family(_torchvision_convnext),
    "series": Family(lambda: ResNet(1), (2, 24)),
    "volumes": Family(lambda: ResNet(3), (2, 8, 8, 8)),
}

TOKENS_OF_IMAGES = {
    "timm/vit": Family(_timm("vit_tiny_patch16_224", img_size=64, depth=2)),
    "timm/swin": Family(
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 2, 1),
            num_heads=(2, 2, 2, 2),
        )
    ),
    "torchvision/vit": Family(_torchvision_vit),
    "transformers/vit": Family(_transformers_vit),
}

FAMILIES = CONVOLUTIONAL | TOKENS_OF_IMAGES

TEXT = {"transformers/bert": Family(ZOO["transformers/bert"].build, ())}


def mixed_equals_alone(model: nn.Module, inputs: Inputs, tasks: Sequence[str | None]) -> None:
    """Every sample of a mixed batch gets what its own task gives it alone."""
    for seed, task in enumerate(filter(None, dict.fromkeys(tasks))):
        stir(model, task, seed)
    mixed = answer(model, inputs, list(tasks))  # type: ignore[arg-type]
    for task in dict.fromkeys(tasks):
        rows = [i for i, name in enumerate(tasks) if name == task]
        alone: Tensor = answer(model, inputs, task)
        torch.testing.assert_close(mixed[rows, : alone.shape[1]], alone[rows], rtol=1e-4, atol=1e-4)
