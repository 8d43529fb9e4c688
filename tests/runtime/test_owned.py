"""What a task owns beside adapters and norms, and what the user trains that no task owns."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import nn

import visadapt
from tests.models import snapshot, stir
from visadapt import VisadaptError
from visadapt.task_file import contents


class Net(nn.Module):
    """A body, two heads and a norm, with outputs as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.heads = nn.ModuleDict({"age": nn.Linear(8, 4), "sex": nn.Linear(8, 2)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        x = self.tail(x + self.body(x)).mean((2, 3))
        return {name: head(x) for name, head in self.heads.items()}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


BOTTLENECK = visadapt.Bottleneck(m=2)


def answers(model: nn.Module, x: torch.Tensor, task: object) -> dict[str, torch.Tensor]:
    with torch.no_grad(), visadapt.using(model, task):
        return model(x)


def test_what_a_task_also_trains_is_its_own_copy(net, x, tmp_path) -> None:
    before, bare = snapshot(net), net(x)
    task = {"head": "heads.age", "num_classes": 3, "train_also": ["heads.sex", "tail"]}
    visadapt.inject(net, visadapt.LoRA(r=1), task="a", where="body.0", example=x, **task)
    assert visadapt.tasks(net)["a"].owned == ("heads.age", "heads.sex", "tail")
    assert torch.equal(answers(net, x, "a")["sex"], bare["sex"])
    row = visadapt.summary(net)["a"]
    tail = sum(p.numel() for p in Net().tail.parameters())
    assert (row.head, row.also) == (3 * 8 + 3, 2 * 8 + 2 + tail)
    assert row.trained == row.adapters + row.norms + row.head + row.also
    assert row.trained == sum(p.numel() for p in visadapt.parameters(net, "a"))
    assert "also" in str(visadapt.summary(net)).splitlines()[1]
    # the norm in tail is tail's, the other one is the norm policy's
    assert row.norms == 16
    stir(net, "a")
    mine = answers(net, x, "a")
    assert mine["age"].shape == (4, 3)
    assert not torch.equal(mine["sex"], bare["sex"])
    assert all(torch.equal(bare[name], value) for name, value in answers(net, x, None).items())

    path = visadapt.save(net, "a", tmp_path / "a.visadapt")
    assert "heads.sex, tail" in str(contents(path))
    merged = visadapt.merge(net, "a", probe=x)
    torch.testing.assert_close(merged(x), mine)
    fresh = Net().eval()
    fresh.load_state_dict(before)
    visadapt.load(fresh, path)
    assert visadapt.tasks(fresh)["a"] == visadapt.tasks(net)["a"]
    assert all(torch.equal(mine[name], value) for name, value in answers(fresh, x, "a").items())
    visadapt.remove(net, "a")
    visadapt.eject(net)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_mixed_batches_run_each_sample_through_its_own_tasks_modules(net, x) -> None:
    visadapt.inject(net, BOTTLENECK, task="a", where="body", train_also="tail")
    visadapt.inject(net, BOTTLENECK, task="b", where="body", train_also=("heads.sex",), head="heads.age")
    visadapt.inject(net, BOTTLENECK, task="c", where="body")
    for seed, task in enumerate("abc"):
        stir(net, task, seed)
    order = ["b", "a", "c", None]
    mixed = answers(net, x, order)
    for row, task in enumerate(order):
        alone = answers(net, x[row : row + 1], task)
        for name in alone:
            torch.testing.assert_close(mixed[name][row : row + 1], alone[name])


def test_by_default_adapters_stand_outside_of_what_is_also_trained() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    visadapt.inject(model, m=2, train_also="layer4", task="a")
    assert not [name for name, _ in visadapt.named_parameters(model, "a") if "layer4" in name and ".also." not in name]
    with pytest.raises(VisadaptError, match=r"layer4.* is in layer4, of which task 'b' trains its own copy"):
        visadapt.inject(model, m=2, train_also="layer4", where="layer4", task="b")
    size = sum(p.numel() for name, p in torchvision.models.resnet18().layer4.named_parameters())
    assert visadapt.summary(model)["a"].also == size
    assert visadapt.summary(model)["a"].fraction > 0.5


REQUESTS = {
    "heads.agee": ({"train_also": "heads.agee"}, r"train_also=: the model has no module 'heads.agee'.*'heads.age'"),
    "an empty list": ({"train_also": []}, r"train_also= must be the path of a module or a list of paths, got \[\]"),
    "a number": ({"train_also": 3}, r"train_also= must be the path"),
    "the whole": ({"train_also": ""}, r"train_also= must name modules inside the model"),
    "no parameters": ({"train_also": "body.2"}, r"train_also=: body.2 \(ReLU\) has no parameters"),
    "one in another": ({"train_also": ["tail", "tail.0"]}, r"tail.0 is inside tail, which is named too"),
    "the head": ({"train_also": "heads.age", "head": "heads.age"}, r"train_also= names heads.age, .* own head already"),
    "a path": ({"head": "head.age"}, r"no head policy 'head.age'; did you mean 'heads.age'"),
    "a policy": ({"head": "newer"}, r"no head policy 'newer'; did you mean 'new'"),
    "which layer": (
        {"head": "whole", "num_classes": 3},
        r"cannot have num_classes=3: it is not known which layer of whole gives the logits: name that layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_that_name_nothing_are_refused_before_anything_changes(net, x, request_) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + self.second(x)

    net.whole = Inside()
    options, message = REQUESTS[request_]
    with pytest.raises(VisadaptError, match=message):
        visadapt.inject(net, BOTTLENECK, where="body", **options)
    assert visadapt.tasks(net) == {}


def test_a_module_that_is_never_called_is_refused() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.attn(x, x, x)[0].mean(1))

    with pytest.raises(VisadaptError, match=r"attn.out_proj is never called.*name attn"):
        visadapt.inject(Attentive(), visadapt.Linear(), norms="frozen", train_also="attn.out_proj", head="fc")


def test_policies_win_over_modules_of_their_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.copy = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.copy(self.body(x).relu())

    model = Named()
    with pytest.raises(VisadaptError, match="head='copy' keeps the backbone's width"):
        visadapt.inject(model, visadapt.Linear(), norms="frozen", num_classes=5, head="copy")
    visadapt.inject(model, visadapt.Linear(), norms="frozen", num_classes=5, head=["copy"])
    assert model(torch.ones(2, 4)).shape == (2, 5)


def test_further_methods_of_a_task_keep_what_it_owns(net, x) -> None:
    visadapt.inject(net, BOTTLENECK, task="a", where="body", train_also="tail", example=x)
    with pytest.raises(VisadaptError, match="task 'a' exists: train_also= is for its first inject"):
        visadapt.inject(net, visadapt.LoRA(r=1), task="a", where="body.0", train_also="heads.sex", example=x)
    visadapt.inject(net, visadapt.LoRA(r=1), task="a", where="body.0", example=x)
    assert visadapt.tasks(net)["a"].also == ("tail",)


def test_full_fine_tuning_leaves_what_the_task_owns_to_it(net, x) -> None:
    visadapt.inject(net, visadapt.Full(), task="a", train_also="tail", head="heads", norms="full")
    assert visadapt.summary(net)["a"].trained == sum(p.numel() for p in Net().parameters())


def test_half_precision_modules_are_trained_in_fp32(net, x) -> None:
    net.bfloat16()
    visadapt.inject(net, BOTTLENECK, where="body", train_also=["heads.sex", "tail"])
    assert {p.dtype for p in visadapt.parameters(net)} == {torch.float32}
    assert {out.dtype for out in net(x.bfloat16()).values()} == {torch.bfloat16}


def trained(model: nn.Module, x: torch.Tensor, *modules: nn.Module) -> None:
    """Train modules for a step by an optimiser of the user's."""
    optimiser = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)
    out = model(x)
    sum(o.square().sum() for o in (out.values() if isinstance(out, dict) else [out])).backward()
    optimiser.step()
    optimiser.zero_grad()


def test_save_sees_what_is_trained_beside_the_task(net, x, tmp_path) -> None:
    visadapt.inject(net, BOTTLENECK, where="body")
    net.tail.requires_grad_(True)
    # unfrozen, but as it was: nothing is lost
    visadapt.save(net, "default", tmp_path / "a")
    trained(net, x, net.tail)
    with pytest.raises(VisadaptError, match=r"unfrozen after inject, and trained: tail; .*train_also=\['tail'\]"):
        visadapt.save(net, "default", tmp_path / "a")
    # the remedy works
    visadapt.inject(net, BOTTLENECK, where="body", task="own", train_also=["tail"])
    net.tail.requires_grad_(False)
    visadapt.save(net, "own", tmp_path / "b")


def test_save_names_a_parameter_of_the_model_itself(net, x, tmp_path) -> None:
    visadapt.inject(net, BOTTLENECK, where="body")
    net.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(VisadaptError, match="and trained: temperature, a parameter of the model itself"):
        visadapt.save(net, "default", tmp_path / "a")


def test_save_sees_replaced_heads_and_new_modules(x, tmp_path) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    visadapt.inject(model, m=2, task="a")
    model.fc = nn.Linear(512, 5)
    with pytest.raises(VisadaptError, match=r"trained: fc; the file of task 'a' would leave that out"):
        visadapt.save(model, "a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    visadapt.inject(model, m=2, task="b", train_also="fc")
    model.fc.requires_grad_(True)
    with pytest.raises(VisadaptError, match="replaced or unfrozen after inject, and trained: fc;"):
        visadapt.save(model, "b", tmp_path / "b")
    model.fc.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    with safe_open(visadapt.save(model, "b", tmp_path / "b"), "pt") as file:
        assert {"fc.also.weight", "fc.also.bias"} <= set(file.keys())
        assert json.loads(file.metadata()["visadapt"])["also"] == ["fc"]


def test_a_copied_model_saves_what_the_original_does(net, tmp_path) -> None:
    visadapt.inject(net, BOTTLENECK, where="body", train_also="tail")
    visadapt.save(copy.deepcopy(net), "default", tmp_path / "a")
    copied = copy.deepcopy(net)
    copied.heads["age"].requires_grad_(True)
    visadapt.save(copied, "default", tmp_path / "b")


def test_files_that_name_other_modules_are_refused(net, x, tmp_path) -> None:
    visadapt.inject(net, BOTTLENECK, where="body", head="heads.age", train_also="tail")
    path = visadapt.save(net, "default", tmp_path / "a")

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"height": nn.Linear(8, 4), "sex": nn.Linear(8, 2)})

    with pytest.raises(VisadaptError, match=r"than this Other: it has beyond it heads\.height"):
        visadapt.load(Other(), path)
