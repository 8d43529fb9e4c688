"""The architectures that every promise is tested on: random weights that leave no branch dead, and small inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt
from visadapt.backbone.modules import walked
from visadapt.runtime.task_modules import TaskModules

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One architecture.

    Attributes:
        name: library/architecture.
        build: makes it, weights as they come.
        kinds: number of sites of each kind that it has.
        norm: path of one of its norms, "" if it has none.
        text: whether it reads tokens rather than images.
        slow: whether a test on it takes more than a moment.
    """

    name: str
    build: Callable[[], nn.Module]
    kinds: dict[str, int]
    norm: str = ""
    text: bool = False
    slow: bool = False
    width: int = field(default=10)

    def make(self, seed: int = 0) -> nn.Module:
        """The backbone in eval mode; the same for the same seed, in every process."""
        torch.manual_seed(seed)
        return enliven(self.build(), seed).eval()

    def inputs(self, seed: int = 0, n: int = 2) -> Inputs:
        """A small batch."""
        generator = torch.Generator().manual_seed(seed)
        if not self.text:
            side = 32 if self.slow else 64
            return {"x": torch.randn(n, 3, side, side, generator=generator)}
        mask = torch.ones(n, 9, dtype=torch.long)
        mask[0, 6:] = 0
        return {"input_ids": torch.randint(5, 60, (n, 9), generator=generator), "attention_mask": mask}


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights, norms' affine parameters and running statistics, so that no zero hides anything."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, p in module._parameters.items():
            if p is None:
                continue
            with torch.no_grad():
                if norm and name == "weight":
                    p.uniform_(0.7, 1.3, generator=generator)
                elif p.ndim < 2:
                    p.normal_(0, 0.1, generator=generator)
                else:
                    p.normal_(0, (1.3 / p[0].numel()) ** 0.5, generator=generator)
        for name, b in module._buffers.items():
            if b is not None and name == "running_mean":
                b.normal_(0, 0.1, generator=generator)
            elif b is not None and name == "running_var":
                b.uniform_(0.7, 1.3, generator=generator)
    return model


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10)

    return build


NARROWER = 4
"""How many times narrower than published most members are; torchvision's ResNet-50 and VGG-16-BN have real widths."""

CHANNELS = tuple(width // NARROWER for width in (64, 128, 256, 512))

GROUPED = tuple(2 * width for width in CHANNELS)
"""Twice as wide, or the first stage's 32 groups would be of one channel each, which makes a depthwise convolution."""

VGGS = {"vgg11": "A", "vgg16": "D", "vgg16_bn": "D"}
"""Torchvision's names of their configurations."""

STAGES = (2, 1, 1, 1)
"""Blocks of each stage of all but one of the ResNet-50s: with and without a projection in the shortcut."""


def _narrow_resnet(block: str, blocks: tuple[int, ...], narrower: int, **options: Any) -> Callable[[], nn.Module]:
    """Torchvision's own class, in which the widths of the stages are written down."""

    def build() -> nn.Module:
        from torchvision.models import resnet

        make_layer = resnet.ResNet._make_layer

        def narrow(model: Any, block: Any, planes: int, *arguments: Any, **more: Any) -> nn.Sequential:
            return make_layer(model, block, planes // narrower, *arguments, **more)

        kind: Any = getattr(resnet, block)
        with patch.object(resnet.ResNet, "_make_layer", narrow):
            model = resnet.ResNet(kind, list(blocks), num_classes=10, **options)
        model.fc = nn.Linear(512 // narrower * kind.expansion, 10)
        return model

    return build


def _torchvision_vgg(name: str, narrower: int = 1) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models.vgg import VGG, cfgs, make_layers

        layers: Any = [width if isinstance(width, str) else width // narrower for width in cfgs[VGGS[name]]]
        with torch.device("meta"):
            model = VGG(make_layers(layers, batch_norm=name.endswith("_bn")), num_classes=10, init_weights=False)
        # the 120 million parameters of its two hidden linears would cost minutes and show nothing more
        model.classifier[0] = nn.Linear(25088 // narrower, 64)
        model.classifier[3] = nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
        model.features.to_empty(device="cpu")
        return model

    return build


def _tiny_vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    features = make_layers([8, "M", 8, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"], batch_norm=True)
    with torch.device("meta"):
        model = VGG(features, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(16, 32)
    model.classifier[3] = nn.Linear(32, 32)
    model.classifier[6] = nn.Linear(32, 10)
    return model


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


def _timm_vgg(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.layers import ClassifierHead
        from timm.models.vgg import VGG, ConvMlp, cfgs

        layers = [width if width == "M" else width // NARROWER for width in cfgs[name]]
        with torch.device("meta"):
            model = VGG(layers, num_classes=10, norm_layer=nn.BatchNorm2d)
        model.pre_logits = ConvMlp(model.features[-3].num_features, 64, 7, drop_rate=0.0)
        model.head = ClassifierHead(64, 10)
        model.features.to_empty(device="cpu")
        return model

    return build


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def _transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**SIZES, "num_labels": 3, **options})
        model: nn.Module = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        return model

    return build


def _resnet(blocks: int, threes: int) -> dict[str, int]:
    return {"block": blocks, "conv3x3": threes}


TOKENS = {"attention": 2, "mlp": 2, "query": 2, "value": 2}

MEMBERS = (
    # narrow ones, for what needs a real architecture but no real size
    Member("tiny/resnet", _timm("resnet18", channels=(8, 16, 24, 32)), _resnet(8, 16), "layer2.0.bn1"),
    Member("tiny/vgg_bn", _tiny_vgg, _resnet(8, 8), "features.1"),
    Member(
        "torchvision/resnet18", _narrow_resnet("BasicBlock", (2, 2, 2, 2), NARROWER), _resnet(8, 16), "layer2.0.bn1"
    ),
    Member("torchvision/resnet50", _torchvision("resnet50"), _resnet(16, 16), "layer2.0.bn1", slow=True),
    Member(
        "torchvision/wide_resnet50_2",
        _narrow_resnet("Bottleneck", STAGES, NARROWER, width_per_group=128),
        _resnet(5, 5),
        "bn1",
        slow=True,
    ),
    Member(
        "torchvision/resnext50_32x4d",
        _narrow_resnet("Bottleneck", STAGES, NARROWER // 2, groups=32, width_per_group=4),
        _resnet(5, 5),
        "bn1",
        slow=True,
    ),
    Member("torchvision/vgg11", _torchvision_vgg("vgg11", NARROWER), _resnet(8, 8), slow=True),
    Member("torchvision/vgg16", _torchvision_vgg("vgg16", NARROWER), _resnet(13, 13), slow=True),
    Member("torchvision/vgg16_bn", _torchvision_vgg("vgg16_bn"), _resnet(13, 13), "features.1", slow=True),
    Member("timm/resnet18", _timm("resnet18", channels=CHANNELS), _resnet(8, 16), "layer2.0.bn1", slow=True),
    Member("timm/resnet26t", _timm("resnet26t", channels=CHANNELS), _resnet(8, 8), "layer2.0.bn1", slow=True),
    Member(
        "timm/resnet50", _timm("resnet50", layers=STAGES, channels=CHANNELS), _resnet(5, 5), "layer2.0.bn1", slow=True
    ),
    Member(
        "timm/resnext50_32x4d",
        _timm("resnext50_32x4d", layers=STAGES, channels=GROUPED),
        _resnet(5, 5),
        "bn1",
        slow=True,
    ),
    Member("timm/seresnet50", _timm("seresnet50", layers=STAGES, channels=CHANNELS), _resnet(5, 5), "bn1", slow=True),
    Member(
        "timm/resnetblur50", _timm("resnetblur50", layers=STAGES, channels=CHANNELS), _resnet(5, 5), "bn1", slow=True
    ),
    Member("timm/vgg11_bn", _timm_vgg("vgg11"), _resnet(8, 8), "features.1", slow=True),
    Member("transformers/bert", _transformers("Bert"), TOKENS, "bert.embeddings.LayerNorm", True, width=3),
    Member(
        "transformers/roberta",
        _transformers("Roberta", pad_token_id=1),
        TOKENS,
        "roberta.embeddings.LayerNorm",
        True,
        width=3,
    ),
    Member(
        "transformers/distilbert",
        _transformers("DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        TOKENS,
        "distilbert.embeddings.LayerNorm",
        True,
        width=3,
    ),
    Member(
        "transformers/electra",
        _transformers("Electra", embedding_size=16),
        TOKENS,
        "electra.embeddings.LayerNorm",
        True,
        width=3,
    ),
)

ZOO = {member.name: member for member in MEMBERS}


def short(text: bool = False, block: Any = None, **options: Any) -> nn.Module:
    """A backbone of two blocks or one layer, for what takes long by the block, as ``torch.compile`` does."""

    def convolutions() -> nn.Module:
        from timm.models.resnet import BasicBlock, ResNet

        model = ResNet(block or BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(8, 16, 16, 16), **options)
        model.layer3 = model.layer4 = nn.Identity()
        return model

    build = _transformers("Bert", num_hidden_layers=1) if text else convolutions
    torch.manual_seed(0)
    return enliven(build()).eval()


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits."""
    out = model(inputs["x"]) if "x" in inputs else model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def answer(model: nn.Module, inputs: Inputs, task: str | None = None) -> Tensor:
    """The logits of one task (None: the bare backbone) in eval mode."""
    model.eval()
    if not visadapt.tasks(model):
        return output(model, inputs)
    with visadapt.using(model, task):
        return output(model, inputs)


def step(model: nn.Module, inputs: Inputs) -> Tensor:
    """Forward and backward of a classifier's loss; the gradients stay."""
    logits = output(model, inputs)
    loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[-1])
    loss.backward()
    return loss.detach()


def train(model: nn.Module, task: str, inputs: Inputs, steps: int = 3) -> None:
    """Really trains a task, with the parent in train mode as a user would have it."""
    model.train()
    optimiser = torch.optim.Adam(visadapt.parameters(model, task), lr=1e-2)
    with visadapt.using(model, task):
        for _ in range(steps):
            optimiser.zero_grad()
            step(model, inputs)
            optimiser.step()
    model.eval()


@torch.no_grad()
def stir(model: nn.Module, task: str, seed: int = 1) -> None:
    """Moves every parameter of a task a little, which is quicker than training it."""
    generator = torch.Generator().manual_seed(seed)
    for p in visadapt.parameters(model, task):
        p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p), alpha=0.05)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor in ``state_dict``."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def bare_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's entries of a ``state_dict``."""
    return {key: value for key, value in state.items() if "visadapt" not in key.split(".")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two ``state_dict`` have the same keys in the same order and the same bits."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def every_module(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path with those of all its tasks, in use or not; no task comes into use by this."""

    def children(module: nn.Module) -> Mapping[str, nn.Module | None]:
        # a task is asked for by its name, which lets it have the modes that were set for all
        return {task: module[task] for task in module} if isinstance(module, TaskModules) else module._modules

    return walked(model, children)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that makes a module itself besides its tensors' values; of all tasks, in use or not."""
    modules = every_module(model)
    parameters = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "trained": {name: p.requires_grad for name, p in parameters.items()},
        "identities": {name: id(p) for name, p in parameters.items()},
        "keys": list(model.state_dict()),
        "hooks": {name: list(module._forward_hooks.values()) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }
