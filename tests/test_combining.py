"""Tasks combined without training: the average and TIES, on tasks whose combination is known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.models import ZOO, Inputs, answer, snapshot
from visadapt import VisadaptError
from visadapt.runtime.registry import named_tensors, registry_of

METHODS = {
    "Parallel": visadapt.Parallel(),
    "Bottleneck": visadapt.Bottleneck(m=2),
    "LoRA": visadapt.LoRA(r=2),
    "DAN": visadapt.DAN(),
    "DAN in 8 bits": visadapt.DAN(bits=8),
    "SSF": visadapt.SSF(),
    "Full": visadapt.Full(),
    "TSA": visadapt.TSA(align=True),
    "DoRA": visadapt.DoRA(r=2),
}


def two(model: nn.Module, method: Any = None, names: tuple[str, ...] = ("a", "b"), **options: Any) -> nn.Module:
    """Tasks whose every parameter, and every statistic of their own, was moved."""
    for seed, name in enumerate(names):
        visadapt.inject(model, method or visadapt.Parallel(), task=name, num_classes=3, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in named_tensors(registry_of(model), name).values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3)
                elif tensor.dtype == torch.int64:
                    tensor.add_(seed + 1)
    return model.eval()


def parameters(model: nn.Module, task: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in visadapt.named_parameters(model, task)}


@pytest.mark.parametrize("norms", ["affine", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_an_average_is_of_every_parameter(tiny: nn.Module, method: str, norms: str) -> None:
    two(tiny, METHODS[method], norms=norms)
    before = {name: parameters(tiny, name) for name in "ab"}
    assert visadapt.combine(tiny, {"a": 0.25, "b": 0.75}, into="c") is tiny
    assert visadapt.active(tiny) == "c"
    found = parameters(tiny, "c")
    assert found.keys() == before["a"].keys()
    for name, value in found.items():
        expected = 0.25 * before["a"][name].double() + 0.75 * before["b"][name].double()
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=0, atol=1e-7)
    for name in "ab":
        assert all(torch.equal(value, before[name][key]) for key, value in parameters(tiny, name).items())


def test_equal_tasks_are_combined_into_the_same(model: nn.Module, inputs: Inputs, tmp_path: Path) -> None:
    """On every architecture: with the same values the combination answers bit for bit the same."""
    visadapt.inject(model, m=2, task="a", num_classes=3)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "a"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    visadapt.load(model, visadapt.save(model, "a", tmp_path / "a.visadapt"), task="b")
    for how in ("average", "ties"):
        visadapt.combine(model, {"a": 0.5, "b": 0.5}, into=how, how=how, **({"density": 1.0} if how == "ties" else {}))
    expected = answer(model, inputs, "a")
    assert torch.equal(answer(model, inputs, "average"), expected)
    torch.testing.assert_close(answer(model, inputs, "ties"), expected)


def test_the_average_of_linear_changes_is_the_change_of_the_average(tiny: nn.Module, image: Tensor) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    for seed, name in enumerate("ab"):
        visadapt.inject(conv, visadapt.Parallel(), task=name, where="0", head="frozen", norms="frozen")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in visadapt.parameters(conv, name):
                parameter.normal_()
    visadapt.combine(conv, {"a": 0.4, "b": 0.6}, into="c")
    outs = {name: answer(conv, {"input": image}, name) for name in "abc"}
    torch.testing.assert_close(outs["c"], 0.4 * outs["a"] + 0.6 * outs["b"])


def test_statistics_are_those_of_the_mixture() -> None:
    """Against batches of the two kinds in these proportions, which no average of variances would give."""
    torch.manual_seed(0)
    x = {"a": torch.randn(3000, 4, 1, 1) * 2 + 5, "b": torch.randn(1000, 4, 1, 1) * 0.5 - 3}
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    for name in "ab":
        visadapt.inject(model, visadapt.LoRA(r=1), task=name, where="1", head="frozen", norms="full")
        model[0].get_submodule(f"visadapt.{name}.norm").momentum = None
        model.train()
        with torch.no_grad(), visadapt.using(model, name):
            model(x[name])
    visadapt.combine(model, {"a": 0.75, "b": 0.25}, into="c")
    norm = model[0].get_submodule("visadapt.c.norm")
    whole = torch.cat([x["a"], x["b"]])
    torch.testing.assert_close(norm.running_mean, whole.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, whole.var((0, 2, 3)), rtol=1e-3, atol=0)
    assert norm.num_batches_tracked == 2
    assert norm.running_var.min() > 4 * 0.75 + 0.25 * 0.25


def test_ties_by_hand() -> None:
    """Yadav et al. 2023, figure 1: trim, elect the sign, and average those that agree."""
    model = nn.Sequential(nn.Conv2d(4, 1, 3, bias=False))
    values = {"a": [1.0, -0.1, 0.9, 0.2], "b": [0.5, 0.8, -1.0, -0.3], "c": [0.05, 0.6, -0.4, 0.7]}
    for name, each in values.items():
        visadapt.inject(model, visadapt.Parallel(), task=name, where="0", head="frozen", norms="frozen")
        with torch.no_grad():
            visadapt.parameters(model, name)[0].copy_(torch.tensor([each]))
    third = 1 / 3
    visadapt.combine(model, dict.fromkeys(values, third), into="d", how="ties", density=0.5, scale=2.0)
    # kept: a 1 and 0.9; b 0.8 and −1; c 0.6 and 0.7. Signs: +, +, − (0.9 − 1), +
    torch.testing.assert_close(visadapt.parameters(model, "d")[0].detach(), 2 * torch.tensor([[1.0, 0.7, -1.0, 0.7]]))
    visadapt.combine(model, {"a": 0.5, "b": 0.3, "c": 0.2}, into="e", how="ties", density=0.5)
    # now a outweighs b in the third: 0.45 − 0.3
    expected = [1.0, (0.3 * 0.8 + 0.2 * 0.6) / 0.5, 0.9, 0.7]
    torch.testing.assert_close(visadapt.parameters(model, "e")[0].detach(), torch.tensor([expected]))


def test_ties_moves_from_where_tasks_start(tiny: nn.Module) -> None:
    """What no task changed stays the backbone's, and is not drawn towards zero."""
    for name in "ab":
        visadapt.inject(tiny, visadapt.Norms(), task=name, num_classes=3, head="new")
    visadapt.combine(tiny, {"a": 0.5, "b": 0.5}, into="c", how="ties", density=0.1)
    found, start = parameters(tiny, "c"), parameters(tiny, "a")
    assert all(torch.equal(found[name], start[name]) for name in found if ".norm." in name)


def test_the_new_task_is_a_task(tiny: nn.Module, image: Tensor, tmp_path: Path) -> None:
    plain = snapshot(tiny)
    two(tiny, norms="full", labels=("x", "y", "z"))
    visadapt.tasks(tiny)["a"].notes.update(backbone={"name": "n"}, metrics={"accuracy": 1.0}, by="a")
    visadapt.tasks(tiny)["b"].notes.update(backbone={"name": "n"}, metrics={"accuracy": 1.0}, by="b")
    state = torch.get_rng_state()
    visadapt.combine(tiny, {"a": 0.5, "b": 0.5}, into="c", how="ties")
    assert torch.equal(torch.get_rng_state(), state)
    spec = visadapt.tasks(tiny)["c"]
    combined = {"how": "ties", "weights": {"a": 0.5, "b": 0.5}, "density": 0.2, "scale": 1.0}
    # what the tasks agree on is kept, but for what was measured on either
    assert spec.notes == {"backbone": {"name": "n"}, "combined": combined}
    assert spec.labels == ("x", "y", "z")
    expected = answer(tiny, {"x": image}, "c")
    path = visadapt.save(tiny, "c", tmp_path / "c.visadapt")
    visadapt.remove(tiny, "c")
    visadapt.load(tiny, path)
    assert torch.equal(answer(tiny, {"x": image}, "c"), expected)
    with visadapt.using(tiny, "c"):
        tiny(image).sum().backward()
    assert all(p.grad is not None for p in visadapt.parameters(tiny, "c"))
    visadapt.eject(tiny)
    assert all(torch.equal(value, plain[name]) for name, value in tiny.state_dict().items())


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": visadapt.LoRA(r=2)}, r"their methods differ \(Parallel\(\) and LoRA\(r=2\)\)"),
    "option": ({"method": visadapt.Parallel(rank=2)}, r"their methods differ \(Parallel\(\) and Parallel\(rank=2\)\)"),
    "sites": ({"where": "layer1.*"}, r"their sites differ \(.* is a site of 'a' only\)"),
    "norms": ({"norms": "full"}, r"their norm policies differ \('affine' and 'full'\)"),
    "classes": ({"num_classes": 4}, r"their numbers of classes differ \(3 and 4\)"),
    "head": ({"num_classes": None, "head": "copy"}, r"their heads differ \('new' and 'copy'\)"),
    "labels": ({"labels": ("x", "y", "z")}, r"their labels differ \(None and \('x', 'y', 'z'\)\)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_combined_is_refused_with_the_reason(tiny: nn.Module, case: str) -> None:
    options, reason = OTHERS[case]
    visadapt.inject(tiny, visadapt.Parallel(), task="a", num_classes=3)
    visadapt.inject(tiny, **{"method": visadapt.Parallel(), "task": "b", "num_classes": 3, **options})
    before = snapshot(tiny)
    with pytest.raises(VisadaptError, match=f"tasks 'a' and 'b' cannot be combined: {reason}"):
        visadapt.combine(tiny, {"a": 0.5, "b": 0.5}, into="c")
    assert list(visadapt.tasks(tiny)) == ["a", "b"]
    assert snapshot(tiny).keys() == before.keys()


def test_other_inputs_are_refused(tiny: nn.Module) -> None:
    two(tiny)
    visadapt.tasks(tiny)["a"].notes["inputs"] = {"kind": "images", "size": 32}
    with pytest.raises(VisadaptError, match="their inputs differ"):
        visadapt.combine(tiny, {"a": 0.5, "b": 0.5}, into="c")


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1.0}, {}, "two or more tasks a weight"),
        (["a", "b"], {}, "two or more tasks a weight"),
        ({"a": 0.5, "d": 0.5}, {}, "no task 'd'"),
        ({"a": 0.5, "b": 0.6}, {}, r"weights must sum to 1, got 1\.1"),
        ({"a": 1.5, "b": -0.5}, {}, "the weight of task 'b' must be a positive number, got -0.5"),
        ({"a": 0.5, "b": True}, {}, "the weight of task 'b' must be a positive number, got True"),
        ({"a": 0.5, "b": 0.5}, {"into": "a"}, "the model has a task 'a' already"),
        ({"a": 0.5, "b": 0.5}, {"into": "a b"}, "a task's name"),
        ({"a": 0.5, "b": 0.5}, {"how": "tie"}, "no way to combine tasks 'tie'; did you mean 'ties'"),
        ({"a": 0.5, "b": 0.5}, {"density": 0.5}, "density= and scale= apply to how='ties' only"),
        ({"a": 0.5, "b": 0.5}, {"how": "ties", "density": 0}, r"density must be a fraction in \(0, 1\], got 0"),
        ({"a": 0.5, "b": 0.5}, {"how": "ties", "scale": -1}, "scale must be a positive number"),
    ],
)
def test_a_call_that_makes_no_sense(tiny: nn.Module, weights: Any, options: dict[str, Any], message: str) -> None:
    two(tiny)
    with pytest.raises(VisadaptError, match=message):
        visadapt.combine(tiny, weights, **{"into": "c", **options})
    assert list(visadapt.tasks(tiny)) == ["a", "b"]


def test_a_model_without_tasks() -> None:
    with pytest.raises(VisadaptError, match="has no tasks"):
        visadapt.combine(ZOO["tiny/resnet"].make(), {"a": 0.5, "b": 0.5}, into="c")
