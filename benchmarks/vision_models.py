"""One small architecture of every family of timm and torchvision: as shallow and on as small images as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.backbone.architectures import TIMM, TORCHVISION, Architecture
from tests.runtime.builds import Build

DEPTHS: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 1)},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 2, 1)},
    {"layers": (1, 1, 1, 1)},
    {"layers": (1, 1, 2, 1)},
    {"num_blocks": 2},
)
"""Options that make a model of timm shallow; a builder refuses those that are not its own."""

SIDES = (64, 96, 128)


@dataclass(frozen=True)
class Kind:
    """What the models of a kind take and return.

    Attributes:
        inputs: a batch of n samples: positional arguments.
        outputs: axis of the samples in the outputs, or "items".
        trains: whether a model in train mode returns the same as in eval mode, and needs no targets.
    """

    inputs: Callable[[int, int], tuple[Any, ...]]
    outputs: Any = 0
    trains: bool = True


def _images(n: int, side: int) -> tuple[Any, ...]:
    return (torch.randn(n, 3, side, side),)


IMAGES = Kind(_images)
VIDEOS = Kind(lambda n, side: (torch.randn(n, 3, 8, side, side),))
PAIRS = Kind(lambda n, side: (*_images(n, side), *_images(n, side), 2))
DETECTION = Kind(lambda n, side: ([torch.rand(3, side, side) for _ in range(n)],), "items", trains=False)


@dataclass(frozen=True)
class VisionModel:
    """One architecture.

    Attributes:
        architecture: with the options and the size that keep it small.
        kind: of its inputs and outputs.
    """

    architecture: Architecture
    kind: Kind = field(default=IMAGES)

    @property
    def name(self) -> str:
        """Library, family and name."""
        return f"{self.architecture.library}/{self.architecture.family}/{self.architecture.name}"

    @property
    def classes(self) -> int:
        """Width of its head."""
        return int(self.architecture.options.get("num_classes", 10 if self.architecture.library == "timm" else 1000))

    def build(self) -> Build:
        """Make it smaller where that can be."""
        architecture = smaller(self.architecture) if self.architecture.library == "timm" else self.architecture
        kind, side = self.kind, architecture.size
        axes = {(0, 0): "items"} if kind.outputs == "items" else {}
        return Build(
            self.name, architecture.build, lambda n: (kind.inputs(n, side), {}), axes, kind.outputs, kind.trains
        )


def smaller(architecture: Architecture) -> Architecture:
    """Return the same architecture with fewer layers and on smaller images, where it runs like that."""
    depths = [{}] if "depth" in architecture.options else [*DEPTHS, {}]
    for depth in depths:
        for side in (*(side for side in SIDES if side < architecture.size), architecture.size):
            for size in ({"img_size": side}, {}) if side < architecture.size else ({},):
                one = replace(architecture, size=side, options=architecture.options | depth | size)
                if _runs(one):
                    return one
    return architecture


def _runs(architecture: Architecture) -> bool:
    try:
        model = architecture.blank()
        with torch.no_grad(), torch.device("meta"):
            out = model(torch.zeros(2, 3, architecture.size, architecture.size))
    except Exception:  # whatever a builder or a model does with sizes that it does not have
        return False
    return isinstance(out, Tensor) and all(p.numel() for p in model.parameters())


def _more() -> Iterator[VisionModel]:
    # other blocks than those of the smallest of their family
    for family, name, size in (
        ("byoanet", "lambda_resnet26t", 256),
        ("byoanet", "botnet26t_256", 256),
        ("coat", "coat_lite_tiny", 224),
        ("maxxvit", "coatnet_nano_rw_224", 224),
    ):
        yield VisionModel(Architecture("timm", family, name, size))

    def one(family: str, name: str, size: int, kind: Kind, **options: Any) -> VisionModel:
        return VisionModel(Architecture("torchvision", family, name, size, options), kind)

    bare = {"weights_backbone": None}
    yield one("googlenet with auxiliary heads", "googlenet", 64, IMAGES, aux_logits=True, init_weights=False)
    yield one("inception with auxiliary heads", "inception_v3", 299, IMAGES, aux_logits=True, init_weights=False)
    yield one("fcn", "fcn_resnet50", 64, IMAGES, num_classes=4, aux_loss=True, **bare)
    yield one("deeplabv3", "deeplabv3_mobilenet_v3_large", 64, IMAGES, num_classes=4, aux_loss=True, **bare)
    yield one("lraspp", "lraspp_mobilenet_v3_large", 64, IMAGES, num_classes=4, **bare)
    small = {"min_size": 64, "max_size": 64, "num_classes": 4, **bare}
    yield one("faster_rcnn", "fasterrcnn_mobilenet_v3_large_320_fpn", 64, DETECTION, **small)
    yield one("mask_rcnn", "maskrcnn_resnet50_fpn", 64, DETECTION, **small)
    yield one("keypoint_rcnn", "keypointrcnn_resnet50_fpn", 64, DETECTION, **small | {"num_classes": 2})
    yield one("retinanet", "retinanet_resnet50_fpn", 64, DETECTION, **small)
    yield one("fcos", "fcos_resnet50_fpn", 64, DETECTION, **small)
    yield one("ssd", "ssd300_vgg16", 300, DETECTION, num_classes=4, **bare)
    yield one("ssdlite", "ssdlite320_mobilenet_v3_large", 320, DETECTION, num_classes=4, **bare)
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        yield one(name, name, 32, VIDEOS, num_classes=4)
    yield one("s3d", "s3d", 224, Kind(lambda n, side: (torch.randn(n, 3, 16, side, side),)), num_classes=4)
    yield one("swin3d", "swin3d_t", 32, VIDEOS, num_classes=4)
    yield one("raft", "raft_small", 128, PAIRS)


MODELS = (*map(VisionModel, (*TIMM, *TORCHVISION)), *_more())
