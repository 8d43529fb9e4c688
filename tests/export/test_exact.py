"""A merge is exact or refused: with a probe and without one, in every precision, however little the task changes."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import timm
import torch
from torch import nn

import visadapt
from tests.models import ZOO, enliven, same, short, snapshot
from visadapt import (
    DAN,
    SSF,
    TSA,
    Biases,
    Bottleneck,
    ConvAdapter,
    DoRA,
    Full,
    LoRA,
    Norms,
    Parallel,
    Series,
    TopLayers,
    VisadaptError,
    inject,
    merge,
    using,
)
from visadapt.export.weights import Weights

LINEAR = Bottleneck(m=3, activation=None)
METHODS = [LINEAR, DAN(), DAN(diagonal=True), LoRA(r=2), Parallel(), Parallel(rank=2), Series(), SSF(), TSA()]


def shaken(model, task="t", by=0.05, seed=3):
    """Moves what a task trains by noise of a size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in visadapt.parameters(model, task):
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * by)
    return model.eval()


@torch.no_grad()
def run(model, x, task=None):
    def logits(out):
        return (out if isinstance(out, torch.Tensor) else out.logits).double()

    inputs = x if isinstance(x, dict) else None
    if not visadapt.tasks(model):
        return logits(model(**inputs) if inputs else model(x))
    with using(model, task):
        return logits(model(**inputs) if inputs else model(x))


def off(model, merged, x, task="t"):
    """The error of a merged model, relative to what the task changes."""
    expected, bare, found = run(model, x, task), run(model, x), run(merged, x)
    return float((found - expected).abs().max() / (expected - bare).abs().max())


class Padded(nn.Module):
    """A conv whose padding is of some mode, and a norm behind it if wanted."""

    def __init__(self, mode, padding, kernel, norm, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, kernel, padding=padding, padding_mode=mode, bias=bias)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3)))


PADDINGS = [(1, 3), ("same", 3), (2, 3), (0, 3), (1, 1), (2, 5), ((1, 0), (3, 1))]


MODES = ("zeros", "reflect", "replicate", "circular")

PADDED = [
    *((mode, *padding, True) for mode in MODES for padding in PADDINGS),
    # without a norm, every mode and every padding once
    *((MODES[number % len(MODES)], *padding, False) for number, padding in enumerate(PADDINGS)),
]


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.parametrize(("mode", "padding", "kernel", "norm"), PADDED)
def test_paddings(mode, padding, kernel, norm):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 11, dtype=torch.float64)
    outcomes = {}
    model = enliven(Padded(mode, padding, kernel, norm)).double().eval()
    for task, method in enumerate(METHODS):
        inject(model, method, task=f"t{task}", where="conv", example=x, norms="frozen")
        shaken(model, f"t{task}")
        for probe in (False, x):
            try:
                merged = merge(model, f"t{task}", probe=probe)
            except VisadaptError as error:
                outcomes[str(method), probe is False] = str(error)
                continue
            outcomes[str(method), probe is False] = ""
            assert off(model, merged, x, f"t{task}") < 1e-9, method
    for method in METHODS:
        # what is found out by running is found out without
        assert bool(outcomes[str(method), True]) == bool(outcomes[str(method), False]), method
        beside = isinstance(method, LoRA | Parallel | TSA)
        assert not outcomes[str(method), True] or (beside and mode != "zeros"), outcomes[str(method), True]
    wide = kernel != 1 and padding != 0
    assert bool(outcomes[str(LoRA(r=2)), True]) == (mode != "zeros" and (wide or padding == 1))


class Tied(nn.Module):
    """Two convs with one weight, in one of the ways in which that is done."""

    def __init__(self, way):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)
        enliven(self).double()
        if way == "parameter":
            self.b.weight = self.a.weight
        elif way == "memory":
            self.b.weight = nn.Parameter(self.a.weight.data)
        elif way == "buffer":
            del self.b.weight
            self.b.register_buffer("weight", self.a.weight.data)

    def forward(self, x):
        x = self.a(self.stem(x).relu()).relu()
        return self.fc(self.norm(self.b(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("way", ["parameter", "memory", "buffer"])
@pytest.mark.parametrize("method", [LoRA(r=2), DAN(), DoRA(r=2), Parallel(), Series(norm=False), SSF()], ids=str)
def test_tied_weights_of_which_one_place_changes(method, way, probe, fold):
    torch.manual_seed(0)
    model, x = Tied(way), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    inject(model, method, task="t", where="a", example=x, norms="frozen")
    shaken(model)
    before = snapshot(model)
    if way == "parameter":
        with pytest.raises(VisadaptError, match=r"at a cannot be merged: (a\.weight is tied to b\.weight|b computes)"):
            merge(model, "t", probe=x if probe else False, fold=fold)
    else:
        # a copy has them apart
        assert off(model, merge(model, "t", probe=x if probe else False, fold=fold), x) < 1e-9
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("way", ["parameter", "memory"])
@pytest.mark.parametrize("method", [Full(), Biases(), Norms(), SSF()], ids=str)
def test_tied_weights_that_change_alike_or_not_at_all(method, way, fold):
    torch.manual_seed(0)
    model, x = Tied(way), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    where = "norm" if isinstance(method, SSF) else None
    inject(model, method, task="t", where=where, example=x, norms="affine" if isinstance(method, Norms) else "frozen")
    shaken(model)
    merged = merge(model, "t", probe=x, fold=fold)
    assert off(model, merged, x) < 1e-9
    assert (merged.a.weight is merged.b.weight) == (way == "parameter")


def test_fold_leaves_tied_and_trained_weights_alone():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for way in ("parameter", "memory", "buffer"):
        model = Tied(way).eval()
        expected = run(model, x)
        torch.testing.assert_close(run(visadapt.fold(model, example=x), x), expected)
        assert isinstance(model.norm, nn.BatchNorm2d)
    model = enliven(Padded("zeros", 1, 3, True)).double().eval()
    model.norm.train()
    visadapt.fold(model, example=x)
    assert isinstance(model.norm, nn.BatchNorm2d)
    model.eval()
    seen = []
    model.conv.register_forward_hook(lambda module, args, out: seen.append(out))
    visadapt.fold(model, example=x)
    assert isinstance(model.norm, nn.BatchNorm2d)


class Functional(nn.Module):
    """Weights that are read by others than their own module."""

    def __init__(self, way):
        super().__init__()
        self.patch, self.fc, self.way = nn.Linear(12, 16), nn.Linear(16, 4), way
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.patch(x)
        if self.way == "attention":
            x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.first(x).relu()
        x = nn.functional.linear(x, self.first.weight.t()) if self.way == "functional" else self.second(x)
        return self.fc(x.mean(1))


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(("way", "where"), [("functional", "first"), ("attention", "attention.out_proj")])
@pytest.mark.parametrize("method", [LoRA(r=2), Parallel(), Series(norm=False)], ids=str)
def test_weights_that_others_read(method, way, where, probe):
    torch.manual_seed(0)
    model, x = Functional(way).double(), torch.randn(3, 5, 12, dtype=torch.float64)
    try:
        inject(model, method, task="t", where=where, example=x, norms="frozen")
    except VisadaptError as error:
        assert "never called" in str(error)  # noqa: PT017
        return
    shaken(model)
    merged = partial(merge, model, "t", probe=x if probe else False)
    if (type(method), way) == (LoRA, "attention"):
        # it stands at the weight, which its one reader has from it
        assert off(model, merged(), x) < 1e-9
        return
    with pytest.raises(VisadaptError, match=r"computes with .* itself|changed the outputs|into the head"):
        merged()


def test_no_foreign_reader_is_seen_where_there_is_none():
    for name in ("tiny/resnet", "transformers/bert", "transformers/roberta"):
        model = ZOO[name].make().double()
        inject(model, LoRA(r=2), task="t")
        shaken(model)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in ZOO[name].inputs().items()}
        assert off(model, merge(model, "t", probe=False), inputs.get("x", inputs)) < 1e-9


class Branching(nn.Module):
    """A conv of which something else than its norm takes the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.conv(x)
        x = x + self.norm(y)
        return self.fc((x + y.tanh()).mean((2, 3)))


@pytest.mark.parametrize("probe", [True, False])
def test_a_conv_that_something_else_takes_is_not_rewritten(probe):
    torch.manual_seed(0)
    model, x = enliven(Branching()).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    inject(model, LINEAR, task="t", example=x, norms="frozen", num_classes=4)
    shaken(model)
    with pytest.raises(VisadaptError, match="cannot be merged"):
        merge(model, "t", probe=x if probe else False)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LITTLE = [
    *product([LINEAR], (False, True), (True, False), DTYPES),
    # of method, folding, probe and precision, every pair of values is here; every triple where the method is `LINEAR`
    *(
        pytest.param(method, bool((row + column) % 2), bool((row + column // 2) % 2), dtype, marks=pytest.mark.slow)
        for row, method in enumerate((LoRA(r=2), Series(), SSF(), Norms()))
        for column, dtype in enumerate(DTYPES)
    ),
]


@pytest.mark.parametrize(("method", "fold", "probe", "dtype"), LITTLE, ids=str)
def test_tasks_that_change_little(method, fold, probe, dtype):
    """Whatever is accepted is off by rounding of what the task changes; what is large enough is accepted."""
    model = short().to(dtype)
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    low = dtype.itemsize == 2
    accepted = []
    for task, by in enumerate([0.0, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1]):
        inject(model, method, task=f"t{task}", norms="affine" if isinstance(method, Norms) else "frozen")
        shaken(model, f"t{task}", by)
        try:
            merged = merge(model, f"t{task}", probe=x if probe else False, fold=fold)
        except VisadaptError as error:
            assert "refused" in str(error) or "rounding" in str(error) or "rounds" in str(error)  # noqa: PT017
            continue
        accepted.append(by)
        expected = run(model, x, f"t{task}")
        most = 1e-6 if dtype == torch.float64 else 1e-3 if dtype == torch.float32 else 0.1
        # what two runs of one model may differ by, which no task that changes less can be told from
        noise = 1e-13 if dtype == torch.float64 else 2e-6 if dtype == torch.float32 else 0.05
        bound = most * (1 if probe else 5) * (expected - run(model, x)).abs().max() + noise * expected.abs().max()
        assert (run(merged, x) - expected).abs().max() <= bound
    if low and fold and not probe:
        assert accepted == []
    else:
        assert 0.0 in accepted or low
        assert low or 0.1 in accepted
        assert dtype != torch.float64 or 1e-5 in accepted


def test_a_task_that_changes_nothing_writes_nothing():
    model = short()
    for number, method in enumerate(METHODS):
        if isinstance(method, TSA):
            continue
        inject(model, method, task=f"t{number}", norms="affine", head="frozen")
        for probe in (None, False):
            merged = merge(model.eval(), f"t{number}", probe=probe)
            plain = short()
            assert same(merged.state_dict(), plain.state_dict()), method


@pytest.mark.parametrize("probe", [None, False])
def test_a_gain_of_zero_is_passed_through(probe):
    """Norms that start at zero, as timm's last ones of each block."""
    model = ZOO["tiny/resnet"].make().double()
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
        model.layer2[0].bn2.weight[::2] = 0
        model.layer3[0].bn2.weight[::3] *= 1e-12
    inject(model, LINEAR, task="t", norms="frozen")
    shaken(model)
    assert off(model, merge(model, "t", probe=probe), torch.randn(2, 3, 64, 64, dtype=torch.float64)) < 1e-9


def test_what_overflows_half_precision_is_refused():
    model = ZOO["tiny/resnet"].make().half()
    inject(model, SSF(), task="t", where="layer1.0.bn1", norms="frozen")
    with torch.no_grad():
        for p in visadapt.parameters(model, "t"):
            p.mul_(1e6)
    for probe in (None, False):
        with pytest.raises(VisadaptError, match=r"overflows torch\.float16"):
            merge(model.eval(), "t", probe=probe)


ARCHITECTURES = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=4, channels=(8, 16, 24, 32)),
    "seresnet": lambda: timm.create_model("seresnet18", num_classes=4, channels=(8, 16, 24, 32)),
    "preact": lambda: timm.create_model("resnetv2_50", num_classes=4, channels=(16, 32, 48, 64), stem_chs=8),
    "densenet": lambda: timm.create_model("densenet121", num_classes=4, growth_rate=4, block_config=(1, 2, 2)),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=4, dims=(8, 16, 24, 32)),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=4
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=2,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        num_classes=4,
    ),
    "mixer": lambda: timm.models.MlpMixer(4, img_size=64, patch_size=32, embed_dim=32, num_blocks=2),
}


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("convnext", "vit"))) for n in ARCHITECTURES]
)
def test_every_method_on_many_architectures_is_exact_or_refused_alike(name):
    torch.manual_seed(0)
    model = enliven(ARCHITECTURES[name]()).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = [*METHODS, DoRA(r=2), ConvAdapter(), Full(), Biases(), Norms(), TopLayers(1)]
    places = [(method, None) for method in plain] + [(LoRA(r=2), "conv"), (DAN(), "linear"), (Series(norm=False), "op")]
    merged = 0
    for number, (method, where) in enumerate(places):
        task = f"t{number}"
        try:
            inject(model, method, task=task, where=where, num_classes=4, norms="frozen" if number % 2 else "affine")
        except VisadaptError:
            continue
        shaken(model, task, by=0.02)
        said = {}
        for probe in (x, False):
            for fold in (False, True):
                try:
                    found = merge(model, task, probe=probe, fold=fold)
                except VisadaptError as error:
                    said[probe is False, fold] = str(error)
                    continue
                said[probe is False, fold] = ""
                assert off(model, found, x, task) < 1e-8, (method, probe is False, fold)
        assert len({bool(text) for text in said.values()}) == 1, (method, said)
        merged += not said[False, False]
    assert merged >= 4


def test_weights_are_put_in_their_places_once():
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain[1].weight = plain[0].weight
    weights = Weights(plain)
    weight, before = plain[0].weight, plain[0].weight.detach().clone()
    for layer in plain:
        weights.write(layer, "weight", weights.read(layer, "weight") * 2, "x at y")
    assert torch.equal(plain[0].weight, before)
    weights.settle(measured=False)
    assert plain[0].weight is plain[1].weight is weight
    assert torch.equal(plain[0].weight, before * 2)
