"""The ladder: its formula, its taps, what it leaves alone, and one pass of the backbone for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt
from tests.methods.families import FAMILIES, TEXT, mixed_equals_alone
from tests.models import answer, output, step, stir
from visadapt import Ladder, VisadaptError
from visadapt.methods.slot import _KEPT
from visadapt.runtime.registry import registry_of
from visadapt.training import Recipe, fit

ALL = FAMILIES | TEXT

TAPS = {
    "tiny/resnet": ["layer1.1", "layer2.1", "layer3.1", "layer4.1"],
    "tiny/vgg": [],
    "timm/convnext": ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"],
    "timm/vit": ["blocks.0", "blocks.1"],
    "timm/swin": ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"],
    "transformers/bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
}


def parts_of(model: nn.Module, task: str = "task") -> dict[str, nn.Module]:
    return {path: p["ladder"] for path, p in registry_of(model).parts(task).items() if "ladder" in p}


@pytest.mark.parametrize("family", [name for name, taps in TAPS.items() if taps])
def test_where_it_taps(family) -> None:
    model = visadapt.inject(ALL[family].make(), Ladder(m=2), task="task", num_classes=3)
    assert list(parts_of(model)) == TAPS[family]
    assert visadapt.tasks(model)["task"].norms == "frozen"


def test_every_block_may_feed_it() -> None:
    model = visadapt.inject(ALL["tiny/resnet"].make(), Ladder(m=2, every=True), task="task", num_classes=3)
    assert list(parts_of(model)) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]


def watch(model: nn.Module, path: str, seen: dict[str, Tensor]) -> Any:
    """Keep what the module at a path gives in its next forward."""

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        seen[path] = out if isinstance(out, Tensor) else out[0]

    return model.get_submodule(path).register_forward_hook(keep)


def reference(parts: dict[str, nn.Module], seen: dict[str, Tensor]) -> Tensor:
    """z of the last rung on maps, as the equation has it, with U·z added to the last block's output."""
    *rungs, network = parts.items()
    last = network[1]
    z = None
    for i, (path, rung) in enumerate([*rungs, (network[0], last.last)]):
        h = seen[path]
        y = torch.einsum("nchw,mc->nmhw", h, rung.down.weight) + rung.down.bias.view(-1, 1, 1)
        if z is not None:
            mu = 1 / (1 + torch.exp(-last.alpha[i - 1] / 0.1))
            y = mu * y + (1 - mu) * F.adaptive_avg_pool2d(z, y.shape[2:])
        block = last.blocks[i]
        x = F.layer_norm(y.movedim(1, -1), y.shape[1:2], block.norm.weight, block.norm.bias).movedim(-1, 1)
        x = F.gelu(F.conv2d(x, block.mix.weight, block.mix.bias, padding=1, groups=y.shape[1]))
        z = y + torch.einsum("nchw,mc->nmhw", x, block.out.weight) + block.out.bias.view(-1, 1, 1)
    return seen[network[0]] + torch.einsum("nmhw,cm->nchw", z, last.up.weight) + last.up.bias.view(-1, 1, 1)


@pytest.mark.parametrize("every", [False, True])
def test_it_is_the_formula(every) -> None:
    model, inputs = ALL["tiny/resnet"].make(), ALL["tiny/resnet"].inputs(2)
    visadapt.inject(model, Ladder(m=3, every=every), task="task", num_classes=3)
    stir(model, "task")
    parts, seen = parts_of(model), {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, path=path: seen.setdefault(path, out.clone())
        )
        for path in parts
    ]
    answer(model, inputs, None)
    for handle in handles:
        handle.remove()
    found: dict[str, Tensor] = {}
    watch(model, "layer4.1", found)
    answer(model, inputs, "task")
    with torch.no_grad():
        torch.testing.assert_close(found["layer4.1"], reference(parts, seen), rtol=1e-4, atol=1e-5)


def test_the_count_is_the_formula() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    visadapt.inject(model, Ladder(m=64), head="frozen")
    widths, m = (256, 512, 1024, 2048), 64
    expected = sum((d + 1) * m for d in widths) + (m + 1) * 2048 + 3 + 4 * (m * m + 3 * m + 10 * m)
    assert visadapt.summary(model)["default"].adapters == expected


def test_the_count_on_tokens_is_the_formula() -> None:
    model = visadapt.inject(ALL["transformers/bert"].make(), Ladder(m=4), head="frozen")
    d, m = 32, 4
    expected = 2 * (d + 1) * m + (m + 1) * d + 1 + 2 * (m * m + 3 * m + m * m + m)
    assert visadapt.summary(model)["default"].adapters == expected


@pytest.mark.parametrize("family", ALL)
def test_identity_gradients_and_mixed_batches(family) -> None:
    model, inputs = ALL[family].make(), ALL[family].inputs(4)
    before = answer(model, inputs)
    visadapt.inject(model, Ladder(m=3), task="same", head="frozen")
    assert torch.equal(answer(model, inputs, "same"), before)
    step(model.train(), inputs)
    named = dict(visadapt.named_parameters(model, "same"))
    assert all(p.grad.any() for name, p in named.items() if ".up." in name)
    for i, task in enumerate(("one", "two")):
        visadapt.inject(model, Ladder(m=3), task=task, num_classes=3 + i)
    mixed_equals_alone(model, inputs, ("one", "two", "two", "one"))
    visadapt.inject(model, Ladder(m=2), task="narrow", num_classes=3)
    mixed_equals_alone(model, inputs, ("one", "narrow", None, "one"))


@pytest.mark.parametrize("family", ALL)
def test_no_gradient_goes_back_through_the_backbone(family) -> None:
    """Nothing that autograd keeps belongs to a block but the last: their outputs require no gradient."""
    model, inputs = ALL[family].make(), ALL[family].inputs(2)
    visadapt.inject(model, Ladder(m=3), task="task", num_classes=3)
    stir(model, "task")
    seen: dict[str, Tensor] = {}
    *taps, last = parts_of(model)
    for path in (*taps, last):
        watch(model, path, seen)
    step(model.train(), inputs)
    assert {path: out.requires_grad for path, out in seen.items()} == dict.fromkeys(taps, False) | {last: True}
    assert all(p.grad is not None and p.grad.any() for p in visadapt.parameters(model, "task"))


@pytest.mark.parametrize("family", ["tiny/resnet", "timm/swin", "transformers/bert", "transformers/vit", "volumes"])
def test_saved_and_loaded(family, tmp_path) -> None:
    model, inputs = ALL[family].make(), ALL[family].inputs(2)
    visadapt.inject(model, Ladder(m=3), task="task", num_classes=3)
    stir(model, "task")
    expected = answer(model, inputs, "task")
    path = visadapt.save(model, "task", tmp_path / "task.visadapt")
    again = ALL[family].make()
    visadapt.load(again, path)
    assert torch.equal(answer(again, inputs, "task"), expected)


def test_other_norms_are_refused() -> None:
    with pytest.raises(VisadaptError, match="norms='affine' trains there: norms must be 'frozen'"):
        visadapt.inject(ALL["tiny/resnet"].make(), Ladder(m=2), num_classes=3, norms="affine")


def test_it_neither_merges_nor_takes_a_budget() -> None:
    model = visadapt.inject(ALL["tiny/resnet"].make(), Ladder(m=2), num_classes=3).eval()
    with pytest.raises(VisadaptError, match=r"layer1\.1 cannot be merged: it feeds a network beside the backbone"):
        visadapt.merge(model)
    with pytest.raises(VisadaptError, match="give m=, not budget="):
        visadapt.inject(ALL["tiny/resnet"].make(), Ladder(), budget=0.1)


CACHED = ("tiny/resnet", "tiny/vgg", "timm/convnext", "torchvision/convnext", "volumes", "timm/vit", "timm/swin",
          "torchvision/vit", "transformers/vit", "transformers/bert")  # fmt: skip


@pytest.mark.parametrize("family", CACHED)
def test_a_cache_covers_the_whole_backbone(family) -> None:
    """A later epoch calls no convolution and no attention of a block; outputs and gradients are those without it."""
    model, inputs = ALL[family].make(), ALL[family].inputs(3)
    for i, task in enumerate(("one", "two")):
        visadapt.inject(model, Ladder(m=3), task=task, num_classes=3 + i)
        stir(model, task, seed=i)
    given = inputs.get("x", inputs)
    cached = visadapt.cache_prefix(model, "one", given)
    *taps, last = parts_of(model, "one")
    assert cached.prefix.path == last
    called = []
    for path in (*taps, last):
        for name, inner in model.get_submodule(path).named_modules():
            if isinstance(inner, nn.Conv2d | nn.Conv3d | nn.Linear) and "visadapt" not in name:
                inner.register_forward_pre_hook(lambda m, _a: called.append(m))
    cached.prefix.hooks = cached.prefix._hooks()
    visadapt.activate(model, "one")
    output(model, inputs).square().sum().backward()
    assert called or family == "tiny/vgg"
    expected = [p.grad.clone() for p in visadapt.parameters(model, "one")]
    model.zero_grad()
    called.clear()
    out = cached(cached.rows).resume()
    out = out if isinstance(out, Tensor) else out.logits
    assert called == []
    torch.testing.assert_close(out, output(model, inputs))
    out.square().sum().backward()
    torch.testing.assert_close([p.grad for p in visadapt.parameters(model, "one")], expected, rtol=1e-4, atol=1e-5)
    # the features are no task's own: another ladder goes on from them, and a mixed batch too
    for tasks in ("two", ["two", "one", "two"]):
        with torch.no_grad(), visadapt.using(model, tasks):
            found = cached(cached.rows).resume()
        found = found if isinstance(found, Tensor) else found.logits
        torch.testing.assert_close(found, answer(model, inputs, tasks), rtol=1e-4, atol=1e-4)
    cached.prefix.close()


def test_nothing_waits_for_a_forward_that_ended() -> None:
    model, inputs = ALL["tiny/resnet"].make(), ALL["tiny/resnet"].inputs(3)
    visadapt.inject(model, Ladder(m=3), task="one", num_classes=3)
    before = set(_KEPT.__dict__)
    cached = visadapt.cache_prefix(model, "one", inputs["x"])
    cached(cached.rows).resume()
    answer(model, inputs, "one")
    assert set(_KEPT.__dict__) == before
    cached.prefix.close()


def test_one_cache_trains_every_ladder() -> None:
    """What a fit on another ladder's features gives is what a fit on the images gives."""
    results = []
    for use in (False, True):
        model, inputs = ALL["tiny/resnet"].make(), ALL["tiny/resnet"].inputs(6)
        for i, task in enumerate(("one", "two")):
            torch.manual_seed(i)
            visadapt.inject(model, Ladder(m=3), task=task, num_classes=3)
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        options = {"recipe": Recipe(epochs=2, batch_size=3, lr=1e-2), "seed": 0}
        if use:
            cached = visadapt.cache_prefix(model, "one", inputs["x"])
            fit(model, "two", (cached.rows, labels), prepare=cached, **options)
            cached.prefix.close()
        else:
            fit(model, "two", (inputs["x"], labels), **options)
        results.append(answer(model, inputs, "two"))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_task_that_acts_below_does_not_go_on_from_a_ladders_cache() -> None:
    model, inputs = ALL["tiny/resnet"].make(), ALL["tiny/resnet"].inputs(3)
    visadapt.inject(model, Ladder(m=3), task="one", num_classes=3)
    visadapt.inject(model, Ladder(m=3, every=True), task="every", num_classes=3)
    visadapt.inject(model, m=2, task="below", num_classes=3, where="layer1", norms="frozen")
    cached = visadapt.cache_prefix(model, "one", inputs["x"])
    for task, place in (("every", r"layer1\.0"), ("below", r"layer1\.0\.bn2")):
        with visadapt.using(model, task), pytest.raises(VisadaptError, match=f"task '{task}' acts at {place} already"):
            cached(cached.rows).resume()
        with pytest.raises(VisadaptError, match=f"task '{task}' acts at {place} already"):
            cached.check(model, task)
    cached.prefix.close()
