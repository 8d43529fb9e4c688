"""A prefix cache is used for what it was made of, or refused: task, weights, autocast, batch, model."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import visadapt
from tests.models import ZOO, enliven, same, snapshot, stir
from visadapt import VisadaptError, cache_prefix, using
from visadapt.backbone.modules import PREFIX
from visadapt.training import Recipe, evaluate, fit


def vit():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 6, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes).eval()


BACKBONES = {
    "vit": (vit, {"early": range(2, 6), "late": range(4, 6)}),
    "resnet": (ZOO["tiny/resnet"].make, {"early": ["layer3", "layer4"], "late": "layer4"}),
    "convnext": (
        lambda: enliven(timm.create_model("convnext_atto", num_classes=4)).eval(),
        {"early": ["stages.2", "stages.3"], "late": "stages.3"},
    ),
    "swin": (
        lambda: enliven(
            timm.create_model(
                "swin_tiny_patch4_window7_224",
                img_size=64,
                window_size=2,
                embed_dim=16,
                depths=(1, 1, 2, 2),
                num_heads=(1, 2, 2, 2),
            )
        ).eval(),
        {"early": slice(-4, None), "late": slice(-1, None)},
    ),
}


def prepared(name="vit"):
    make, where = BACKBONES[name]
    model = make()
    for task, sites in where.items():
        visadapt.inject(model, m=4, task=task, where=sites, norms="frozen", num_classes=3)
        stir(model, task)
    return model, torch.randn(6, 3, 64 if name == "swin" else 32, 64 if name == "swin" else 32)


ROWS = torch.arange(6)


def off(model, cached, x, task):
    """The largest difference that the cache makes to a task's logits, relative to them."""
    with torch.no_grad(), using(model, task):
        # narrower heads are padded with -inf
        found, expected = (out.nan_to_num(neginf=0.0) for out in (cached(ROWS).resume(), model(x)))
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")])
def test_caches_of_one_model_do_not_meet(name, order):
    model, x = prepared(name)
    classes = [type(module) for module in model.modules()]
    caches = {task: cache_prefix(model, task, x) for task in order}
    assert caches["early"].prefix.path != caches["late"].prefix.path
    for task in ("early", "late", "early"):
        assert off(model, caches[task], x, task) < 1e-5
    caches[order[0]].prefix.close()
    assert off(model, caches[order[1]], x, order[1]) < 1e-5
    caches[order[1]].prefix.close()
    assert [type(module) for module in model.modules()] == classes
    assert not any(PREFIX in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_other_tasks_go_on_from_it_only_if_nothing_of_theirs_lies_below(name):
    model, x = prepared(name)
    early, late = (cache_prefix(model, task, x) for task in ("early", "late"))
    assert off(model, early, x, "late") < 1e-5
    assert off(model, early, x, None) < 1e-5
    assert off(model, early, x, ["late", "early", None, "late", "early", "late"]) < 1e-5
    for tasks in ("early", ["late", "early", "late", "late", "late", None]):
        with pytest.raises(VisadaptError, match=r"is of task 'late'.*'early' acts at"), using(model, tasks):
            late(ROWS).resume()


@pytest.mark.parametrize("active", ["early", "late", None])
def test_a_cache_of_a_task_in_train_mode_whichever_is_active(active):
    """Its dropout is off while the cache is compared with the model, and its norms' statistics stay."""
    model = ZOO["tiny/resnet"].make()
    for task in ("early", "late"):
        visadapt.inject(model, visadapt.Bottleneck(m=2, dropout=0.5), task=task, where="layer4", num_classes=3)
        stir(model, task)
    visadapt.activate(model, active)
    model.train()
    before = snapshot(model)
    cache_prefix(model, "late", torch.randn(4, 3, 32, 32))
    assert same(model.state_dict(), before)


def test_fit_takes_a_cache_of_its_own_task_and_model_only():
    model, x = prepared()
    labels, options = ROWS % 3, {"recipe": Recipe(epochs=1, batch_size=3), "progress": False}
    caches = {task: cache_prefix(model, task, x) for task in ("early", "late")}
    before = [p.clone() for p in visadapt.parameters(model, "early")]
    for task, other in (("early", "late"), ("late", "early")):
        with pytest.raises(VisadaptError, match=f"cache of task '{other}', and '{task}' is to be trained"):
            fit(model, task, (ROWS, labels), prepare=caches[other], **options)
    with pytest.raises(VisadaptError, match="cache of another model"):
        fit(prepared()[0], "early", (ROWS, labels), prepare=caches["early"], **options)
    with pytest.raises(VisadaptError, match="augment"):
        fit(model, "early", (ROWS, labels), prepare=caches["early"], augment=lambda b, g: b + 1, **options)
    with pytest.raises(VisadaptError, match="rows"):
        fit(model, "early", (x, labels), prepare=caches["early"], **options)
    assert all(map(torch.equal, before, visadapt.parameters(model, "early")))
    fit(model, "early", (ROWS, labels), prepare=caches["early"], **options)
    assert not any(map(torch.equal, before, visadapt.parameters(model, "early")))
    assert evaluate(model, "early", (ROWS, labels), prepare=caches["early"])["loss"] > 0


def test_a_checkpoint_knows_the_data_behind_the_cache(tmp_path):
    model, x = prepared()
    file, labels, options = tmp_path / "c", ROWS % 3, {"recipe": Recipe(epochs=1), "progress": False}
    fit(model, "late", (ROWS, labels), prepare=cache_prefix(model, "late", x), checkpoint=file, **options)
    with pytest.raises(VisadaptError, match="inputs was"):
        fit(model, "late", (ROWS, labels), prepare=cache_prefix(model, "late", x + 1), checkpoint=file, **options)


def _weights(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)


def _one_value(model):
    model.blocks[1].attn.qkv.weight.data[3, 5] += 1e-3


def _functional(model):
    model.pos_embed.data.neg_()


def _replaced(model):
    model.blocks[0].mlp = nn.Identity()


def _hook(model):
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 2)


def _wider(model):
    model.double()


def _injected(model):
    visadapt.inject(model, visadapt.LoRA(r=2), task="late", where="blocks.0.attn.qkv", norms="frozen")
    stir(model, "late")


@pytest.mark.parametrize("change", [_weights, _one_value, _functional, _replaced, _hook, _wider, _injected])
def test_what_changed_below_is_noticed(change):
    model, x = prepared()
    cached = cache_prefix(model, "late", x)
    change(model)
    with pytest.raises(VisadaptError, match=r"since the cache was made|was replaced|acts at"), using(model, "late"):
        cached(ROWS).resume()


def test_what_changes_above_is_computed():
    model, x = prepared()
    cached = cache_prefix(model, "late", x)
    with torch.no_grad():
        model.blocks[5].mlp.fc1.weight.mul_(1.5)
    stir(model, "late", seed=5)
    assert off(model, cached, x, "late") < 1e-5


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_autocast_is_the_one_that_it_was_made_in(made, used):
    model, x = prepared()
    cast = [torch.autocast("cpu", torch.bfloat16) if on else nullcontext() for on in (made, used)]
    with cast[0]:
        cached = cache_prefix(model, "late", x)
    refused = pytest.raises(VisadaptError, match="autocast") if made != used else nullcontext()
    with refused, cast[1]:
        assert off(model, cached, x, "late") < 1e-5


def test_a_cache_made_in_inference_mode_can_be_trained_on():
    model, x = prepared()
    with torch.inference_mode():
        cached = cache_prefix(model, "late", x)
    with using(model, "late"):
        cached(ROWS).resume().sum().backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "late"))


class Checkpointed(nn.Module):
    """Blocks that are computed again in backward, two at a time."""

    def __init__(self, reentrant, length):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.fc, self.reentrant, self.length = nn.Linear(8, 3), reentrant, length

    def _run(self, start, x):
        for block in self.blocks[start : start + self.length]:
            x = block(x)
        return x

    def forward(self, x):
        for start in range(0, 4, self.length):
            x = checkpoint(self._run, start, x, use_reentrant=self.reentrant)
        return self.fc(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_computing_again_is_right_or_refused(reentrant, length):
    """A segment may begin below the end of the prefix and end above it."""
    model = Checkpointed(reentrant, length)
    x = torch.randn(5, 8)
    visadapt.inject(model, m=2, task="t", where=["blocks.1", "blocks.2", "blocks.3"], example=x, norms="frozen")
    stir(model, "t")
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reentrant segments of which no input has a gradient
        cached = cache_prefix(model, "t", x)
        if reentrant:
            x = x.requires_grad_()
        expected = _gradients(model, model(x))
        if length > 1 or reentrant:
            out = cached(torch.arange(5)).resume()
            with pytest.raises(VisadaptError, match="computed again in backward"):
                _gradients(model, out)
            return
        found = _gradients(model, cached(torch.arange(5)).resume())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def _gradients(model, out):
    model.zero_grad()
    out.square().sum().backward()
    return [p.grad for p in visadapt.parameters(model, "t")]


class SequenceFirst(nn.Module):
    """An encoder whose batch is its second axis, as torch's own is by default."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.encoder(self.patch(x).flatten(2).permute(2, 0, 1)).mean(0))


class BatchStatistics(nn.Module):
    """A network whose samples see one another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.late(self.stem(x)).mean((2, 3)))


class Random(nn.Module):
    """A network that draws what it computes."""

    def __init__(self):
        super().__init__()
        self.stem, self.late, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.late(self.stem(x + torch.rand_like(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "where"),
    [(SequenceFirst, "encoder.layers.2"), (BatchStatistics, "late.0"), (Random, "late")],
)
def test_what_is_not_kept_sample_by_sample_is_refused(model, where):
    torch.manual_seed(0)
    model, x = enliven(model()).eval(), torch.randn(4, 3, 32, 32)
    visadapt.inject(model, m=2, task="t", where=where, norms="frozen", num_classes=5, example=x)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(VisadaptError, match=r"cannot be kept|no prefix to keep"):
        cache_prefix(model, "t", x)
    assert [type(module) for module in model.modules()] == classes


def test_sizes_that_change_from_batch_to_batch_are_refused():
    model, _ = prepared("resnet")
    x = torch.randn(6, 3, 64, 64)
    sizes = iter([64, 64, 64, 48, 64, 64, 64])

    def crop(batch):
        return batch[..., : next(sizes)]

    with pytest.raises(VisadaptError, match="one size"):
        cache_prefix(model, "late", x, prepare=crop, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.empty(0, 3, 32, 32)}, "length of 1 or more"),
        ({"inputs": {"x": torch.ones(2), "y": torch.ones(3)}}, "one length"),
        ({"inputs": [1, 2]}, "must be a tensor"),
        ({"batch_size": 0}, "batch_size"),
        ({"views": True}, "views"),
        ({"views": 1.5}, "views"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    model, x = prepared()
    with pytest.raises(VisadaptError, match=message):
        cache_prefix(model, "late", **{"inputs": x, **options})
    assert not any(PREFIX in vars(module) for module in model.modules())


@pytest.mark.parametrize("rows", [torch.tensor([6]), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(1, 1), [0]])
def test_wrong_rows_are_named(rows):
    model, x = prepared()
    with pytest.raises(VisadaptError, match="rows"):
        cache_prefix(model, "late", x)(rows)


def test_a_closed_cache_is_refused_and_eject_leaves_nothing():
    model, x = prepared()
    cached, other = cache_prefix(model, "late", x), cache_prefix(model, "early", x)
    cached.prefix.close()
    with pytest.raises(VisadaptError, match="was closed"), using(model, "late"):
        cached(ROWS).resume()
    visadapt.lean(model)
    other.prefix.close()
    visadapt.unlean(model)
    cache_prefix(model, "early", x)
    visadapt.eject(model)
    assert not any("visadapt" in key for module in model.modules() for key in vars(module))
    assert all(type(module).__module__.startswith(("torch.", "timm.")) for module in model.modules())


def test_lean_and_the_cache_go_away_in_any_order():
    model = visadapt.inject(torchvision.models.resnet18(), m=2, task="t", where="layer4", norms="frozen").eval()
    x = torch.randn(2, 3, 64, 64)
    classes = [type(module) for module in model.modules()]
    for first, second in ((visadapt.lean, cache_prefix), (cache_prefix, visadapt.lean)):
        for lean_goes_first in (False, True):
            made = [step(model, "t", x) if step is cache_prefix else step(model) for step in (first, second)]
            cached = next(each for each in made if each is not model)
            ends = [cached.prefix.close, lambda: visadapt.unlean(model)]
            for end in reversed(ends) if lean_goes_first else ends:
                end()
            assert [type(module) for module in model.modules()] == classes
