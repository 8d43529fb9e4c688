"""Merging: a plain backbone that computes what the task does, exactly, or a refusal that says where and why."""

from __future__ import annotations

import copy
import functools
import logging
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

import visadapt
from benchmarks.measure import resnet50
from tests.methods.cases import CASES
from tests.models import ZOO, Member, anatomy, answer, enliven, output, same, snapshot, stir
from visadapt import (
    DAN,
    SSF,
    AdaptFormer,
    Biases,
    Bottleneck,
    CoLoRA,
    ConvAdapter,
    DoRA,
    Full,
    Ladder,
    Linear,
    LoRA,
    Mona,
    Norms,
    Parallel,
    Series,
    TopLayers,
    VisadaptError,
    using,
)
from visadapt.backbone.modules import CHILD
from visadapt.runtime.registry import registry_of

LINEAR = Bottleneck(m=3, activation=None)
CONVS = ["tiny/resnet", "torchvision/resnet18", "torchvision/resnext50_32x4d", "timm/resnet26t", "tiny/vgg_bn"]
TEXTS = ["transformers/bert", "transformers/roberta", "transformers/distilbert", "transformers/electra"]
GROUPED = "resnext"


def slow(*names):
    return [pytest.param(name, marks=[pytest.mark.slow] * ZOO[name].slow) for name in names]


def prepared(model, method, *, num_classes=7, norms="affine", where=None, seed=3, task="task"):
    """A task that is far from the identity, statistics of its own included."""
    visadapt.inject(model, method, task=task, num_classes=num_classes, norms=norms, where=where)
    stir(model, task, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if f".{CHILD}.{task}." in name and "running_" in name:
            buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer), alpha=0.3)
    return model.eval()


def doubled(member: Member):
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in member.inputs().items()}
    return member.make().double(), inputs


def error(found, expected) -> float:
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def traceless(merged: nn.Module, like: nn.Module) -> None:
    """Nothing of visadapt is in a module: same classes, same keys, same hooks, nothing frozen."""
    assert anatomy(merged)["classes"] == anatomy(like)["classes"]
    assert list(merged.state_dict()) == list(like.state_dict())
    for name, module in merged.named_modules():
        assert CHILD not in module._modules
        assert not [key for key in vars(module) if "visadapt" in key], name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad for p in merged.parameters())


MERGEABLE = {
    "linear bottleneck": LINEAR,
    "parallel": Parallel(),
    "parallel of low rank": Parallel(rank=2),
    "series": Series(),
    "series without norm": Series(norm=False),
    "tsa": visadapt.TSA(),
    "dan": DAN(),
    "diagonal dan": DAN(diagonal=True),
    "dan of 6 bits": DAN(bits=6, alpha=0.5),
    "lora": LoRA(r=2, alpha=3),
    "dora": DoRA(r=2),
    "ssf": SSF(),
    "linear": Linear(),
    "norms": Norms(),
    "biases": Biases(),
    "top layers": TopLayers(2),
    "full": Full(),
}
DENSE = ("parallel", "parallel of low rank", "series", "series without norm", "tsa")


def suits(method: str, name: str) -> bool:
    # a dense 1×1 has no place in a grouped conv, nor a constant before a padded one: both are refused, see below
    return not (GROUPED in name and method in DENSE) and not ("vgg" in name and method == "linear bottleneck")


# both policies with each method, and with each network
@pytest.mark.parametrize(
    ("method", "name", "norms"),
    [
        (method, name, ("affine", "full")[(i + j) % 2])
        for i, method in enumerate(MERGEABLE)
        for j, name in enumerate(("tiny/resnet", "tiny/vgg_bn"))
        if suits(method, name)
    ],
)
def test_every_rule_is_exact_in_float64(method, name, norms) -> None:
    member = ZOO[name]
    model, inputs = doubled(member)
    prepared(model, MERGEABLE[method], norms="frozen" if method in ("linear", "biases") else norms)
    expected = answer(model, inputs, "task")
    before = snapshot(model)
    merged = visadapt.merge(model, "task")
    assert error(answer(merged, inputs), expected) <= 1e-10
    assert same(model.state_dict(), before)
    assert torch.equal(answer(model, inputs, "task"), expected)


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in MERGEABLE for n in CONVS if n not in ("tiny/resnet", "tiny/vgg_bn") and suits(m, n)],
)
def test_every_rule_is_exact_on_every_kind_of_conv(method, name) -> None:
    """Strided, grouped, 1×1 and 7×7 among them."""
    model, inputs = doubled(ZOO[name])
    prepared(model, MERGEABLE[method], norms="frozen" if method in ("linear", "biases") else "full")
    expected = answer(model, inputs, "task")
    assert error(answer(visadapt.merge(model, "task", inplace=True, probe=False), inputs), expected) <= 1e-10


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("method", "where"),
    [
        (LINEAR, None),
        (LoRA(r=2), None),
        (Parallel(rank=2), "query"),
        (DAN(), ["query", "value"]),
        (Series(norm=False), ["attention", "mlp"]),
        (SSF(), None),
        (Norms(), None),
        (Biases(), None),
        (TopLayers(1), None),
        (Full(), None),
    ],
    ids=str,
)
def test_every_rule_is_exact_on_texts(name, method, where) -> None:
    model, inputs = doubled(ZOO[name])
    prepared(model, method, where=where, norms="frozen" if isinstance(method, Biases) else "affine")
    expected = answer(model, inputs, "task")
    merged = visadapt.merge(model, "task")
    assert error(answer(merged, inputs), expected) <= 1e-10


class Geometry(nn.Module):
    """One conv of some geometry, a norm behind it, and enough around it to be a network."""

    def __init__(self, kernel, stride, dilation, padding, groups, bias) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(
            8, 12, kernel, stride=stride, dilation=dilation, padding=padding, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3)))


GEOMETRIES = {
    "1x1": (1, 1, 1, 0, 1, False),
    "1x1 strided, biased": (1, 2, 1, 0, 1, True),
    "3x3": (3, 1, 1, 1, 1, True),
    "3x3 strided": (3, 2, 1, 1, 1, False),
    "3x3 dilated": (3, 1, 2, 2, 1, False),
    "3x3 unpadded": (3, 1, 1, 0, 1, False),
    "5x3": ((5, 3), (2, 1), 1, (2, 1), 1, False),
    "even": (4, 2, 1, 1, 1, False),
    "same": (3, 1, 2, "same", 1, True),
    "7x7 strided": (7, 2, 1, 3, 1, False),
}


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.parametrize("method", [Parallel(), Parallel(rank=2), Series(), DAN(), LoRA(r=2), SSF()], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry, method) -> None:
    torch.manual_seed(0)
    model = enliven(Geometry(*GEOMETRIES[geometry])).double().eval()
    prepared(model, method, where="conv", num_classes=None)
    x = torch.randn(2, 3, 17, 14, dtype=torch.double)
    expected = answer(model, {"x": x}, "task")
    merged = visadapt.merge(model, "task", probe=x)
    assert error(answer(merged, {"x": x}), expected) <= 1e-10


@pytest.mark.parametrize("method", [DAN(), DAN(diagonal=True), LoRA(r=2), SSF()], ids=str)
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convs(groups, method) -> None:
    torch.manual_seed(0)
    model = enliven(Geometry(3, 2, 1, 1, groups, False)).double().eval()
    prepared(model, method, where="conv", num_classes=None)
    x = torch.randn(2, 3, 17, 14, dtype=torch.double)
    expected = answer(model, {"x": x}, "task")
    assert error(answer(visadapt.merge(model, "task", probe=x), {"x": x}), expected) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear bottleneck", "parallel", "series", "dan", "lora", "ssf"])
def test_in_float32_on_resnet50(method) -> None:
    member = ZOO["torchvision/resnet50"]
    model = prepared(member.make(), MERGEABLE[method])
    inputs = member.inputs()
    expected = answer(model, inputs, "task")
    for fold in (False, True):
        assert error(answer(visadapt.merge(model, "task", fold=fold, probe=inputs["x"]), inputs), expected) <= 1e-4


def test_several_methods_at_one_conv_in_any_order() -> None:
    """What each does to the other's weights depends on their order."""
    for order in ([Parallel(), Series(), SSF()], [SSF(), Parallel(), DAN()], [LINEAR, SSF(), LoRA(r=2), Series()]):
        model, inputs = doubled(ZOO["tiny/resnet"])
        for method in order:
            visadapt.inject(model, method, task="task")
        stir(model, "task")
        expected = answer(model, inputs, "task")
        assert error(answer(visadapt.merge(model, "task"), inputs), expected) <= 1e-10


def test_own_weights_under_adapters() -> None:
    for methods in ([Full(), DAN(), Parallel()], [DAN(), Full(), LINEAR]):
        model, inputs = doubled(ZOO["tiny/resnet"])
        for method in methods:
            visadapt.inject(model, method, task="task")
        stir(model, "task")
        expected = answer(model, inputs, "task")
        assert error(answer(visadapt.merge(model, "task"), inputs), expected) <= 1e-10


@pytest.mark.parametrize("name", ["tiny/resnet", "tiny/vgg_bn", *TEXTS, *slow("torchvision/resnext50_32x4d")])
def test_a_merged_model_has_no_trace_of_visadapt(name) -> None:
    member = ZOO[name]
    plain = member.make()
    model = prepared(member.make(), Norms(), norms="affine", num_classes=7)
    visadapt.inject(model, m=2, task="other")
    with using(model, ["task"] * 2):  # whoever asked for a mixed batch has hooks at the model's door
        output(model, member.inputs())
    merged = visadapt.merge(model, "task")
    traceless(merged, plain)
    assert type(merged) is type(plain)
    assert not merged.training
    with pytest.raises(VisadaptError, match="has no tasks"):
        visadapt.activate(merged, "task")
    # a state dict of a fresh model with such a head, and it can be injected anew
    fresh = member.make(seed=5)
    config = getattr(fresh, "config", None)
    if config is not None:
        config.num_labels = 7
        fresh = type(fresh)(config)
    elif hasattr(fresh, "reset_classifier"):
        fresh.reset_classifier(7)
    else:
        last = [n for n, m in fresh.named_modules() if isinstance(m, nn.Linear)][-1]
        fresh.set_submodule(last, nn.Linear(fresh.get_submodule(last).in_features, 7))
    fresh.load_state_dict(merged.state_dict(), strict=True)
    expected = answer(model, member.inputs(), "task")
    assert error(answer(fresh, member.inputs()), expected) <= 1e-5
    visadapt.inject(merged, m=2)
    assert error(answer(merged, member.inputs(), "default"), expected) <= 1e-5


def test_what_libraries_keep_of_a_heads_width_follows(tmp_path) -> None:
    model = prepared(ZOO["tiny/resnet"].make(), Norms(), num_classes=7)
    merged = visadapt.merge(model, "task")
    assert (model.num_classes, merged.num_classes) == (10, 7)
    member = ZOO["transformers/bert"]
    model = member.make()
    visadapt.inject(model, LINEAR, task="task", num_classes=2, labels=["bad", "good"])
    stir(model, "task")
    expected = answer(model, member.inputs(), "task")
    for inplace in (False, True):
        merged = visadapt.merge(model, "task", inplace=inplace)
        assert merged.num_labels == merged.config.num_labels == 2
        assert merged.config.id2label == {0: "bad", 1: "good"}
        merged.save_pretrained(tmp_path / str(inplace))
        again = type(merged).from_pretrained(tmp_path / str(inplace))
        assert again.config.id2label == {0: "bad", 1: "good"}
        assert error(answer(again, member.inputs()), expected) <= 1e-5
        assert merged(**member.inputs(), labels=torch.tensor([0, 1])).loss.isfinite()
    visadapt.unmerge(model)
    visadapt.activate(model, None)
    assert model.num_labels == model.config.num_labels == 3


@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
@pytest.mark.parametrize("train", [False, True])
def test_in_place_and_back_bit_for_bit(name, train) -> None:
    member = ZOO[name]
    inputs = member.inputs()
    model = prepared(member.make(), LINEAR, norms="affine")
    visadapt.inject(model, m=2, task="other", norms="full")
    visadapt.activate(model, ["task", "other"])
    handle = model.register_forward_hook(lambda *_: None)
    mixed = output(model, inputs)
    answers = {task: answer(model, inputs, task) for task in (None, "task", "other")}
    model.train(train)
    before, kept = snapshot(model), anatomy(model)
    merged = visadapt.merge(model, "task", inplace=True)
    assert merged is model
    assert not visadapt.tasks(model)
    assert not any(CHILD in key for key in model.state_dict())
    assert error(output(model, inputs), answers["task"]) <= 1e-5
    assert list(model._forward_hooks) == [handle.id]
    assert not model._forward_pre_hooks
    with pytest.raises(VisadaptError, match="has no tasks"):
        visadapt.merge(model, "task")
    assert visadapt.unmerge(model) is model
    assert same(model.state_dict(), before)
    found = anatomy(model)
    assert {key: found[key] for key in kept if key != "hooks"} == {key: kept[key] for key in kept if key != "hooks"}
    assert visadapt.active(model) == ("task", "other")
    model.eval()
    assert torch.equal(output(model, inputs), mixed)
    with pytest.raises(VisadaptError, match=r"2 tasks .* batch of 3"):
        output(model, {key: torch.cat([value, value])[:3] for key, value in inputs.items()})
    for task, expected in answers.items():
        assert torch.equal(answer(model, inputs, task), expected)
    handle.remove()
    assert handle.id not in model._forward_hooks
    visadapt.eject(model)
    assert same(model.state_dict(), member.make().state_dict())


def test_unmerge_refuses_what_was_not_merged_in_place(tiny) -> None:
    with pytest.raises(VisadaptError, match="ResNet was not merged in place"):
        visadapt.unmerge(tiny)
    prepared(tiny, LINEAR)
    merged = visadapt.merge(tiny)
    with pytest.raises(VisadaptError, match="was not merged in place"):
        visadapt.unmerge(merged)
    visadapt.merge(tiny, inplace=True)
    visadapt.inject(tiny, m=2, task="new")
    with pytest.raises(VisadaptError, match="new tasks after the merge"):
        visadapt.unmerge(tiny)
    visadapt.eject(tiny)
    visadapt.unmerge(tiny)
    assert list(visadapt.tasks(tiny)) == ["task"]


@pytest.mark.parametrize("name", ["tiny/resnet", "tiny/vgg_bn", *slow("torchvision/resnet18", "timm/resnet26t")])
@pytest.mark.parametrize("inplace", [False, True])
def test_folding_after_the_merge(name, inplace) -> None:
    model, inputs = doubled(ZOO[name])
    prepared(model, Parallel(), norms="full")
    expected = answer(model, inputs, "task")
    state = snapshot(model)
    merged = visadapt.merge(model, "task", fold=True, inplace=inplace)
    assert (merged is model) == inplace
    assert not [m for m in merged.modules() if isinstance(m, nn.BatchNorm2d)]
    assert error(answer(merged, inputs), expected) <= 1e-10
    if inplace:
        visadapt.unmerge(model)
    assert same(model.state_dict(), state)


def test_fold_of_a_plain_model() -> None:
    for name in ("resnet18", "mobilenet_v2"):
        model = enliven(torchvision.models.get_model(name, weights=None)).double().eval()
        x = torch.randn(2, 3, 64, 64, dtype=torch.double)
        expected = answer(model, {"x": x})
        assert visadapt.fold(model) is model
        assert error(answer(model, {"x": x}), expected) <= 1e-10
        assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # norms that carry an activation leave it behind
    model = enliven(timm.create_model("mobilenetv3_small_050", num_classes=4)).double().eval()
    expected = answer(model, {"x": x})
    visadapt.fold(model)
    assert error(answer(model, {"x": x}), expected) <= 1e-10
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_fold_leaves_what_it_may_not_touch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Conv2d(3, 4, 3)
            self.after_seen = nn.BatchNorm2d(4)
            self.twice = nn.Conv2d(4, 4, 1)
            self.after_twice = nn.BatchNorm2d(4)
            self.batch = nn.Conv2d(4, 4, 1)
            self.after_batch = nn.BatchNorm2d(4, track_running_stats=False)
            self.bare = nn.Conv2d(4, 4, 1)
            self.without_affine = nn.BatchNorm2d(4, affine=False)

        def forward(self, x):
            seen = self.seen(x)
            x = self.after_seen(seen) + seen
            x = self.after_twice(self.twice(self.twice(x)))
            return self.without_affine(self.bare(self.after_batch(self.batch(x)))).mean((2, 3))

    model = enliven(Net()).double().eval()
    x = torch.randn(3, 3, 9, 9, dtype=torch.double)
    expected = answer(model, {"x": x})
    visadapt.fold(model, example=x)
    assert error(answer(model, {"x": x}), expected) <= 1e-10
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["after_seen", "after_twice", "after_batch"]


def test_fold_refuses_tasks_and_train_mode(tiny) -> None:
    with pytest.raises(VisadaptError, match="call eval"):
        visadapt.fold(tiny.train())
    visadapt.inject(tiny.eval(), m=2)
    with pytest.raises(VisadaptError, match="merge one first"):
        visadapt.fold(tiny)


REFUSED = {
    "a nonlinearity": (
        "tiny/resnet",
        Bottleneck(m=2),
        {},
        r"the bottleneck at layer1\.0\.bn2 cannot be merged: its activation is not linear \(activation=None would",
    ),
    "a depthwise conv": (
        "tiny/resnet",
        Bottleneck(m=2, activation=None, depthwise=True),
        {},
        r"the bottleneck at layer1\.0\.bn2 .*its depthwise conv looks beyond one position",
    ),
    "a network beside the backbone": (
        "tiny/resnet",
        Ladder(),
        {"norms": "frozen"},
        r"the ladder at .* cannot be merged: it",
    ),
    "convolutions inside": ("tiny/resnet", Mona(m=2), {}, r"the mona at layer1\.0\.bn2 cannot be merged: "),
    "a nonlinearity beside": (
        "transformers/bert",
        AdaptFormer(m=2),
        {},
        r"the adaptformer at bert\.encoder\.layer\.0\.output cannot be merged: it changes its host's input",
    ),
    "a nonlinear branch beside": (
        "tiny/resnet",
        ConvAdapter(),
        {},
        r"the convadapter at layer1\.0\.conv1 cannot be merged: it has a nonlinearity",
    ),
    "a nonlinear branch behind": (
        "tiny/resnet",
        ConvAdapter(scheme="conv-sequential"),
        {},
        r"the convadapter at layer1\.0\.conv1 cannot be merged: it has a nonlinearity",
    ),
    "a tap of a block's input": (
        "tiny/resnet",
        ConvAdapter(scheme="residual-parallel"),
        {},
        r"the convadapter at layer1\.0 cannot be merged: it changes its host's input",
    ),
    "an alignment before the head": (
        "tiny/resnet",
        visadapt.TSA(align=True),
        {},
        r"the tsa at fc cannot be merged: it changes its host's input",
    ),
    "a dense 1×1 beside a grouped conv": (
        "torchvision/resnext50_32x4d",
        Parallel(),
        {"where": "conv3x3:layer1.0.*"},
        r"the parallel at layer1\.0\.conv2 cannot be merged: a dense 1×1 beside a grouped convolution \(32 groups\)",
    ),
    "a dense 1×1 behind a grouped conv": (
        "torchvision/resnext50_32x4d",
        Series(norm=False),
        {"where": "conv3x3:layer1.0.*"},
        r"the series at layer1\.0\.conv2 cannot be merged: a dense 1×1 after a grouped conv mixes its groups",
    ),
    "a bias before a zero-padded conv": (
        "tiny/vgg_bn",
        LINEAR,
        {},
        r"the bottleneck at features\.2 cannot be merged: nothing linear ends at features\.2 \(ReLU\).*zero-padded",
    ),
    "what stands behind an attention's add": (
        "tiny/resnet",
        LINEAR,
        {"where": "module:layer1.0"},
        r"the bottleneck at layer1\.0 cannot be merged: nothing linear ends at layer1\.0 \(BasicBlock\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (GROUPED in REFUSED[c][0])) for c in REFUSED]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_not_exact_is_refused_with_its_site_and_reason(case, inplace) -> None:
    name, method, options, said = REFUSED[case]
    model = prepared(ZOO[name].make(), method, num_classes=None, **options)
    before, looks = snapshot(model), anatomy(model)
    with pytest.raises(VisadaptError, match=said):
        visadapt.merge(model, "task", inplace=inplace)
    assert same(model.state_dict(), before)
    assert anatomy(model) == looks


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            Norms(),
            r"the norm at bn1 cannot be merged: it uses its batch's statistics in train mode; call eval\(\) first",
        ),
        (Series(), r"the series at layer1\.0\.conv1 cannot be merged: its inner norm uses its batch's statistics"),
    ],
    ids=str,
)
def test_statistics_of_the_batch_are_refused(method, said, tiny) -> None:
    prepared(tiny, method, norms="full" if isinstance(method, Norms) else "affine").train()
    before = snapshot(tiny)
    with pytest.raises(VisadaptError, match=said):
        visadapt.merge(tiny, "task")
    assert same(tiny.state_dict(), before)
    visadapt.merge(tiny.eval(), "task")


def test_a_task_that_is_not_there_is_refused(tiny) -> None:
    with pytest.raises(VisadaptError, match="has no tasks"):
        visadapt.merge(tiny)
    prepared(tiny, LINEAR, task="flowers")
    with pytest.raises(VisadaptError, match="did you mean 'flowers'"):
        visadapt.merge(tiny, "flower")
    visadapt.activate(tiny, None)
    with pytest.raises(VisadaptError, match="no task None"):
        visadapt.merge(tiny)


def test_a_shift_behind_a_conv_that_nothing_can_take_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.conv(x).relu().mean((2, 3)))

    model = prepared(enliven(Net()).eval(), SSF(), num_classes=None)
    with pytest.raises(VisadaptError, match="the ssf at conv cannot be merged: conv has no bias, and no BatchNorm"):
        visadapt.merge(model)
    with torch.no_grad():
        for name, p in visadapt.named_parameters(model, "task"):
            if name == "conv.ssf.beta":
                p.zero_()
    visadapt.merge(model)


def test_a_scale_behind_an_activation_that_a_norm_carries_is_refused() -> None:
    model = enliven(timm.create_model("mobilenetv2_035", num_classes=4)).eval()
    prepared(model, SSF(), num_classes=None)
    with pytest.raises(VisadaptError, match=r"the ssf at bn1 .*BatchNormAct2d there ends in an activation"):
        visadapt.merge(model, probe=torch.randn(2, 3, 32, 32))


def test_a_conv_that_does_more_to_its_weight_is_refused() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    model = enliven(nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))).eval()
    x = torch.randn(2, 3, 8, 8)
    for method in (Series(norm=False), Parallel(), LoRA(r=2)):
        visadapt.inject(model, method, task="task", where="0", example=x)
        stir(model, "task")
        with pytest.raises(VisadaptError, match=r"at 0 cannot be merged: .*does more to its weight than apply it"):
            visadapt.merge(model, probe=x)
        visadapt.eject(model)


def test_a_layer_of_another_library_that_only_applies_its_weight_is_merged() -> None:
    class Multiplied(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = enliven(nn.Sequential(Multiplied(6, 8), nn.ReLU(), Multiplied(8, 2))).eval()
    x = torch.randn(4, 6)
    visadapt.inject(model, LoRA(r=2), where="linear", head="frozen", example=x)
    stir(model, "default")
    with torch.no_grad():
        assert error(visadapt.merge(model, probe=x)(x), model(x)) <= 1e-5


def test_the_probe_leaves_nothing_behind_in_the_merged_model() -> None:
    class Shortened(nn.Module):
        """Leaves its sparse way of computing for good when an input is short, as BigBird does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.sparse = nn.Linear(6, 8), True

        def forward(self, x):
            self.sparse = self.sparse and len(x) > 3
            return self.fc(x) * (2 if self.sparse else 1)

    model = enliven(Shortened()).eval()
    x = torch.randn(4, 6)
    visadapt.inject(model, LoRA(r=2), where="linear", head="frozen", example=x)
    stir(model, "default")
    merged = visadapt.merge(model, probe=x[:2])
    assert merged.sparse
    visadapt.merge_error(model, merged, "default", x[:2])
    assert merged.sparse
    assert model.sparse


def test_a_deep_network_folds_before_its_task_has_learnt() -> None:
    model = resnet50()
    visadapt.inject(model, Parallel(), task="task")
    x = torch.randn(2, 3, 64, 64)
    expected = answer(model, {"x": x}, "task")
    assert error(visadapt.merge(model, "task", fold=True, probe=x)(x), expected) <= 1e-4


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("method", [Series(norm=False), Parallel(), LoRA(r=2), SSF()], ids=str)
def test_a_weight_that_is_computed_anew_takes_nothing(tiny, image, norm, method) -> None:
    norm(tiny.layer1[0].conv1)
    expected = answer(tiny, {"x": image})
    visadapt.inject(tiny, method, task="task", where="layer1.0.conv1", norms="frozen")
    assert torch.equal(answer(tiny, {"x": image}, "task"), expected)
    stir(tiny, "task")
    assert not torch.equal(answer(tiny, {"x": image}, "task"), expected)
    with pytest.raises(VisadaptError, match=r"at layer1\.0\.conv1 cannot be merged: .*weight is computed anew"):
        visadapt.merge(tiny, probe=False)


def test_own_weights_take_no_part_where_a_weight_came_to_be_computed(tiny) -> None:
    visadapt.inject(tiny, Full(), task="task", norms="frozen")
    conv = tiny.layer1[0].conv1
    with using(tiny, None), pytest.raises(VisadaptError, match=r"layer1\.0\.conv1\.weight cannot be pruned"):
        nn.utils.spectral_norm(conv)
    # past the module's own access to attributes, which refuses it
    conv.__dict__["weight"] = 2 * conv._parameters.pop("weight").detach()
    with pytest.raises(
        VisadaptError, match=r"full at layer1\.0\.conv1 cannot be merged: the weight of its host is not"
    ):
        visadapt.merge(tiny, "task", probe=False)


def test_a_forward_that_runs_the_injected_model_is_refused(tiny, image) -> None:
    """``copy.deepcopy`` leaves the functions that a closure holds, so that the merged model would run this one."""
    forward = tiny.layer1.forward
    tiny.layer1.forward = lambda x: forward(x) * 2
    prepared(tiny, LoRA(r=2))
    for probe in (image, False):
        with pytest.raises(VisadaptError, match="layer1 has a forward of its own, a function that runs this model"):
            visadapt.merge(tiny, "task", probe=probe)
    del tiny.layer1.forward
    tiny.layer1.forward = functools.partial(type(tiny.layer1).forward, tiny.layer1)
    expected = answer(tiny, {"x": image}, "task")
    assert error(visadapt.merge(tiny, "task", probe=image)(image), expected) <= 1e-4


def test_hooks_that_replace_what_they_see_are_run_on_the_probe(tiny, image) -> None:
    tiny.layer2[0].conv1.register_forward_hook(lambda module, args, out: out.clamp(-0.5, 0.5))
    prepared(tiny, Parallel(), where="layer2.0.conv1")
    expected = answer(tiny, {"x": image}, "task")
    assert error(answer(visadapt.merge(tiny, "task"), {"x": image}), expected) <= 1e-4


def test_the_error_on_the_probe_is_logged(tiny, image, caplog) -> None:
    prepared(tiny, LINEAR, num_classes=None)
    with caplog.at_level(logging.INFO, logger="visadapt.export.merging"):
        visadapt.merge(tiny, "task", probe=image)
    said = caplog.messages[-1]
    found = re.fullmatch(r"merged 'task': largest error (\S+) where outputs reach (\S+)", said)
    assert found
    assert 0 <= float(found[1]) < 1e-4 < float(found[2])
    error, largest = visadapt.merge_error(tiny, visadapt.merge(tiny, "task", probe=False), "task", image)
    assert (f"{error:.2g}", f"{largest:.3g}") == found.groups()
    assert visadapt.merge_error(tiny, ZOO["tiny/resnet"].make(), "task", image)[0] > 0.1
    caplog.clear()
    visadapt.merge(tiny, "task", probe=False)
    assert not caplog.messages


def test_a_rule_that_is_wrong_is_found_out_by_the_probe(tiny, monkeypatch) -> None:
    from visadapt.methods.bottleneck import BottleneckAdapter

    right = BottleneckAdapter.as_affine
    monkeypatch.setattr(BottleneckAdapter, "as_affine", lambda self: (right(self)[0] * 1.05, right(self)[1]))
    prepared(tiny, LINEAR)
    before = snapshot(tiny)
    with pytest.raises(VisadaptError, match=r"changed what goes into the head by .* of what the task .*refused"):
        visadapt.merge(tiny, "task", inplace=True)
    assert same(tiny.state_dict(), before)


def test_a_model_whose_input_cannot_be_guessed_needs_a_probe() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x, y):
            return self.fc(self.norm(self.conv(x + y)).mean((2, 3)))

    pair = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    model = visadapt.inject(enliven(Pair()).eval(), Parallel(), where="conv", example=pair)
    stir(model, "default")
    with pytest.raises(VisadaptError, match="pass probe="):
        visadapt.merge(model)
    merged = visadapt.merge(model, probe=pair, fold=True)
    assert isinstance(merged.norm, nn.Identity)
    with torch.no_grad():
        assert error(merged(*pair), model(*pair)) <= 1e-5
        assert error(visadapt.merge(model, probe=False)(*pair), model(*pair)) <= 1e-5


@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
def test_a_half_precision_backbone_takes_what_it_can(name) -> None:
    member = ZOO[name]
    model = prepared(member.make().to(torch.bfloat16), LINEAR)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in member.inputs().items()}
    expected = answer(model, inputs, "task").float()
    merged = visadapt.merge(model, "task")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert error(answer(merged, inputs).float(), expected) <= 0.05


def test_gpt2_keeps_its_weights_the_other_way_round() -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=60, n_positions=40, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    for method, where in (
        (LoRA(r=2), "qkv"),
        (DAN(), "*.c_proj"),
        (Parallel(), "*.c_fc"),
        (LINEAR, None),
        (SSF(), None),
    ):
        model = enliven(transformers.GPT2ForSequenceClassification(config)).double().eval()
        prepared(model, method, where=where)
        ids = {"input_ids": torch.randint(1, 60, (2, 9))}
        expected = answer(model, ids, "task")
        assert error(answer(visadapt.merge(model, "task"), ids), expected) <= 1e-10


def test_merging_looks_inside_a_wrapper(tiny, image) -> None:
    prepared(tiny, LINEAR)
    expected = answer(tiny, {"x": image}, "task")
    merged = visadapt.merge(nn.DataParallel(tiny), "task")
    assert type(merged) is type(tiny)
    assert error(answer(merged, {"x": image}), expected) <= 1e-5


def test_a_copy_of_what_was_merged_in_place_unmerges_by_itself(tiny, image) -> None:
    prepared(tiny, LINEAR)
    expected = answer(tiny, {"x": image}, "task")
    visadapt.merge(tiny, "task", inplace=True)
    twin = copy.deepcopy(tiny)
    visadapt.unmerge(twin)
    assert torch.equal(answer(twin, {"x": image}, "task"), expected)
    assert not visadapt.tasks(tiny)
    visadapt.unmerge(tiny)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in tiny.parameters()}


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
def test_colora_merges_without_its_branch() -> None:
    build = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "num_classes": 4}
    model = enliven(timm.create_model("convnext_atto", **build)).double().eval()
    prepared(model, CoLoRA(branch=False))
    prepared(model, CoLoRA(), task="branch")
    inputs = {"x": torch.randn(2, 3, 64, 64, dtype=torch.float64)}
    for probe in (None, False):
        merged = visadapt.merge(model, "task", probe=probe)
        assert error(answer(merged, inputs), answer(model, inputs, "task")) <= 1e-10
        with pytest.raises(VisadaptError, match="cannot be merged: its filter depends on its input"):
            visadapt.merge(model, "branch", probe=probe)


def test_every_method_has_a_case_here() -> None:
    covered = {type(m) for m in MERGEABLE.values()} | {type(row[1]) for row in REFUSED.values()}
    assert covered | {CoLoRA} == {type(case.method) for case in CASES.values()}


@pytest.mark.parametrize("known", [True, False])
def test_without_a_probe_a_weight_that_the_model_reads_itself_is_refused(known) -> None:
    """Which is seen in a run on the shapes that inject was given; where there are none, it cannot be seen."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 4)
            self.fc = nn.Linear(6, 2)

        def forward(self, x, y):
            return self.fc(nn.functional.linear(torch.relu(self.encode(x + y)), self.encode.weight.t()))

    pair = torch.randn(2, 6), torch.randn(2, 6)
    model = visadapt.inject(Tied().eval(), LoRA(r=2), where="encode", example=pair)
    stir(model, "default")
    if not known:
        # as if it had been loaded
        registry_of(model).example = None
    with pytest.raises(VisadaptError, match="the model computes with" if known else "it cannot be seen whether other"):
        visadapt.merge(model, probe=False)
