"""Parameter counts as published."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import visadapt as v


def adapters(model, method, **options):
    """Number of the adapters' parameters, and what part of the backbone they are."""
    with torch.device("meta"):
        built = v.inject(model(), method, norms="frozen", head="frozen", **options)
    summary = v.summary(built)
    return summary["default"].adapters, summary["default"].adapters / summary.backbone


class Shortcut(nn.Module):
    """Pooled, with zeros for the channels that are not there yet."""

    def forward(self, x):
        x = nn.functional.avg_pool2d(x, 2)
        return torch.cat([x, torch.zeros_like(x)], 1)


class ResNet26(nn.Module):
    """Rebuffi's: three stages of four basic blocks, 64, 128 and 256 wide, and shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        blocks, inputs = [], 32
        for width in (64, 128, 256):
            for i in range(4):
                blocks.append(BasicBlock(inputs, width, 1 if i else 2, None if i else Shortcut()))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class WRN284(nn.Module):
    """A wide ResNet-28-4: a stem of 16, three groups of four blocks, 64, 128 and 256 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, inputs = [], 16
        for width in (64, 128, 256):
            for i in range(4):
                blocks.append(WideBlock(inputs, width, 2 if i == 0 and width > 64 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(256)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


RESNET50 = torchvision.models.resnet50


def named(value) -> str:
    """The same in every process, as the address in a function's own text is not."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("model", "method", "count"),
    [
        (RESNET50, v.Parallel(), 1_257_472),
        (RESNET50, v.Series(), 1_265_024),
        (RESNET50, v.Series(norm=False), 1_257_472),
        (RESNET50, v.Parallel(rank=1 / 8), 314_368),
        (RESNET50, v.DAN(), 1_257_472),
        (RESNET50, v.TSA(), 1_257_472),
    ],
    ids=named,
)
def test_numbers(model, method, count) -> None:
    assert adapters(model, method)[0] == count


@pytest.mark.filterwarnings("ignore:the dan at")
@pytest.mark.parametrize(("method", "count"), [(v.DAN(), 774_400), (v.DAN(diagonal=True), 4_048)], ids=str)
def test_dan_on_a_wide_resnet(method, count) -> None:
    """The paper's counts are those of all convolutions: the stem and the projecting shortcuts are among them."""
    assert adapters(WRN284, method, where="conv")[0] == count


@pytest.mark.parametrize(
    ("model", "method", "percent"),
    [
        (torchvision.models.resnet18, v.Parallel(), 10.9),
        (torchvision.models.resnet18, v.TSA(), 10.9),
        (RESNET50, v.Parallel(), 5.35),
        (RESNET50, v.Series(), 5.38),
        (RESNET50, v.Parallel(rank=1 / 8), 1.34),
        (RESNET50, v.LoRA(r=8), 1.29),
        (RESNET50, v.ConvAdapter(gamma=8), 0.85),
        (RESNET50, v.ConvAdapter(gamma=4), 1.52),
        (RESNET50, v.Bottleneck(m=8), 1.09),
        (RESNET50, v.Bottleneck(m=64), 8.29),
        (RESNET50, v.Bottleneck(m=256), 33.0),
    ],
    ids=named,
)
@pytest.mark.filterwarnings("ignore:the bottleneck at")
def test_percentages(model, method, percent) -> None:
    digits = len(str(percent).partition(".")[2])
    assert round(100 * adapters(model, method)[1], digits) == percent


@pytest.mark.parametrize(
    ("method", "where", "percent"),
    [(v.Bottleneck(m=64), "conv3x3", 2.08), (v.LoRA(r=8), "conv", 2.70)],
    ids=str,
)
def test_percentages_elsewhere(method, where, percent) -> None:
    assert round(100 * adapters(RESNET50, method, where=where)[1], 2) == percent


@pytest.mark.filterwarnings("ignore:the dan at")
def test_dan_on_all_convs_of_a_bottleneck_resnet_is_larger_than_the_network() -> None:
    count, fraction = adapters(RESNET50, v.DAN(), where="conv")
    assert round(count / 1e6, 1) == 28.2
    assert round(100 * fraction) == 120


def test_parallel_is_a_ninth() -> None:
    count, fraction = adapters(ResNet26, v.Parallel())
    convs = [m for m in ResNet26().blocks.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert count == 32 * 64 + 7 * 64**2 + 64 * 128 + 7 * 128**2 + 128 * 256 + 7 * 256**2
    assert count * 9 == sum(conv.weight.numel() for conv in convs)
    assert len(convs) == 24
    assert round(100 * fraction, 1) == 11.1


def test_norms_of_resnet50() -> None:
    with torch.device("meta"):
        model = v.inject(RESNET50, v.Norms(), head="frozen")
    summary = v.summary(model)
    assert summary["default"].norms == 53_120
    assert round(100 * summary["default"].fraction, 2) == 0.23


def test_bert_large() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=3
    )
    with torch.device("meta"):
        model = v.inject(transformers.BertForSequenceClassification(config), m=64)
    summary = v.summary(model)["default"]
    assert summary.adapters == 48 * (2 * 1024 * 64 + 1024 + 64)
    assert round(summary.adapters / 1e6, 2) == 6.34
    assert round(summary.norms / 1e6, 2) == 0.10
    encoder = sum(p.numel() for name, p in model.named_parameters() if ".layer." in name and "visadapt" not in name)
    assert round(100 * (summary.adapters + summary.norms) / encoder, 2) == 2.13
