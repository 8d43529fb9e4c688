"""Networks on series, volumes and clips: 1-D and 3-D convolutions, channels first and last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import enliven

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Block(nn.Module):
    """The residual block that ResNets of every rank share."""

    def __init__(self, rank: int, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        conv, norm = CONVS[rank - 1], NORMS[rank - 1]
        self.conv1 = conv(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        shortcut = nn.Sequential(conv(inputs, width, 1, stride, bias=False), norm(width))
        self.downsample = shortcut if stride > 1 or inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A ResNet whose names are torchvision's, of any rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.stem = CONVS[rank - 1](2, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(rank, 8, 8, 1))
        self.layer2 = nn.Sequential(Block(rank, 8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).flatten(2).mean(2))


class Chain(nn.Module):
    """Convolutions in a row, as in wav2vec's encoder or C3D: no shortcut, a GroupNorm, a permutation at the end."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = CONVS[rank - 1]
        layers = [
            nn.Sequential(conv(2 if i == 0 else 8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.GELU()) for i in range(4)
        ]
        self.convs = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x)
        return self.fc(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


class ResidualUnit(nn.Module):
    """Two convolutions, each with an InstanceNorm and a PReLU, and a shortcut: MONAI's."""

    def __init__(self, rank: int, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        conv = CONVS[rank - 1]
        norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]

        def unit(n: int, s: int) -> nn.Module:
            return nn.Sequential(conv(n, width, 3, s, padding=1), norm(width, affine=True), nn.PReLU())

        self.conv = nn.Sequential(unit(inputs, stride), unit(width, 1))
        self.residual = conv(inputs, width, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.residual(x)


class UNet(nn.Module):
    """An encoder and a decoder with transposed convolutions, joined by skips, as in MONAI's UNet."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.down1 = ResidualUnit(rank, 2, 8, 2)
        self.down2 = ResidualUnit(rank, 8, 12, 2)
        self.up1 = up(12, 8, 2, 2)
        self.mix = ResidualUnit(rank, 16, 8)
        self.up2 = up(8, 8, 2, 2)
        self.out = CONVS[rank - 1](8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.up1(self.down2(a))
        return self.out(self.up2(self.mix(torch.cat([a, b], 1))))


def video_resnet() -> nn.Module:
    """torchvision's R(3D)-18, narrow in depth."""
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=5)


def video_swin() -> nn.Module:
    """torchvision's Swin3D: channels last."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=5)


@dataclass(frozen=True)
class Member:
    """One network: its layout, and the shape of an input."""

    build: Callable[[], nn.Module]
    layout: str
    shape: tuple[int, ...]
    wider: tuple[int, ...]

    def make(self, seed: int = 0) -> nn.Module:
        """The network in eval mode, with weights that leave nothing dead."""
        model, state = _made(self, seed)
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    def example(self, n: int = 2, seed: int = 0) -> Tensor:
        """A batch."""
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(seed))


@cache
def _made(member: Member, seed: int) -> tuple[nn.Module, Tensor]:
    """A network, which takes most of a test's time to draw, and torch's random state afterwards."""
    torch.manual_seed(seed)
    return enliven(member.build(), seed).eval(), torch.get_rng_state()


NETWORKS = {
    "resnet-1d": Member(lambda: ResNet(1), "NCL", (2, 8), (2, 20)),
    "resnet-2d": Member(lambda: ResNet(2), "NCHW", (2, 8, 8), (2, 8, 12)),
    "resnet-3d": Member(lambda: ResNet(3), "NCDHW", (2, 8, 8, 8), (2, 8, 8, 12)),
    "chain-1d": Member(lambda: Chain(1), "NCL", (2, 8), (2, 20)),
    "chain-3d": Member(lambda: Chain(3), "NCDHW", (2, 8, 8, 8), (2, 4, 8, 8)),
    "unet-1d": Member(lambda: UNet(1), "NCL", (2, 8), (2, 16)),
    "unet-3d": Member(lambda: UNet(3), "NCDHW", (2, 8, 8, 8), (2, 8, 8, 12)),
    "video-resnet": Member(video_resnet, "NCDHW", (3, 4, 16, 16), (3, 4, 16, 24)),
    "video-swin": Member(video_swin, "NDHWC", (3, 4, 32, 32), (3, 4, 32, 64)),
}
"""Most have as many channels as positions along an axis at the first block: shapes alone would not tell."""
