"""Facts of a backbone: established once per call, kept as long as they hold."""

import timm
import torch
from torch import nn

import visadapt
from visadapt.backbone import facts as module
from visadapt.backbone import traced
from visadapt.backbone.facts import Facts
from visadapt.runtime.registry import facts_of


def counted(monkeypatch, names):
    """Count the calls of functions that facts are established by."""
    calls = dict.fromkeys(names, 0)
    for name in names:
        function = getattr(module, name)

        def counting(*args, _name=name, _function=function):
            calls[_name] += 1
            return _function(*args)

        monkeypatch.setattr(module, name, counting)
    return calls


def test_a_backbone_is_read_once_per_inject(monkeypatch, tmp_path):
    calls = counted(monkeypatch, ("own_modules", "find_head", "find_norms"))
    model = timm.create_model("resnet18", num_classes=10)
    visadapt.inject(model, m=4, task="a", num_classes=3, labels=["x", "y", "z"])
    assert calls == {"own_modules": 1, "find_head": 1, "find_norms": 1}
    visadapt.inject(model, m=4, task="b", num_classes=3)
    assert calls == {"own_modules": 2, "find_head": 1, "find_norms": 1}  # one look whether the facts still hold
    visadapt.save(model, "a", tmp_path / "a")
    fresh = timm.create_model("resnet18", num_classes=10)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "visadapt" not in k})
    calls.update(dict.fromkeys(calls, 0))
    visadapt.load(fresh, tmp_path / "a")
    assert calls == {"own_modules": 1, "find_head": 1, "find_norms": 1}


def test_facts_that_no_longer_hold_are_established_again():
    model = timm.create_model("resnet18", num_classes=10)
    visadapt.inject(model, m=4, task="a")
    before = facts_of(model)
    assert facts_of(model) is before
    model.layer4[1] = nn.Identity()
    after = facts_of(model)
    assert after is not before
    assert "layer4.1.conv1" not in after.modules


def test_facts():
    facts = Facts(timm.create_model("resnet18", num_classes=10))
    assert facts.head_modules == ("fc",)
    assert facts.size == sum(p.numel() for n, p in facts.model.named_parameters() if not n.startswith("fc."))
    assert "bn1" in facts.norms
    assert facts.dtype == torch.float32
    assert Facts(timm.create_model("resnet18", num_classes=10).double()).dtype == torch.float64
    assert facts.sites() == visadapt.sites(facts.model)


class Blocks(nn.Module):
    """Residual blocks of no family, between layers that take an input of 5 numbers and a second one."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x, scale):
        x = self.stem(x) * scale[:, None]
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x)


def test_one_trace_serves_all_tasks_with_examples_alike(monkeypatch):
    runs = []
    trace = traced.trace_flow
    monkeypatch.setattr(traced, "trace_flow", lambda *args: runs.append(args) or trace(*args))
    model = Blocks()
    for number, rows in enumerate((2, 2, 3)):
        example = {"x": torch.randn(rows, 5), "scale": torch.randn(rows)}
        visadapt.inject(model, m=2, task=f"t{number}", example=example, num_classes=4)
    assert len(runs) == 2
    model.blocks[1] = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    visadapt.sites(model, example=example)
    assert len(runs) == 3


def test_an_input_is_not_guessed_again_for_each_batch(monkeypatch):
    torch.manual_seed(0)
    model, inputs = Blocks().eval(), (torch.randn(4, 5), torch.rand(4))
    for task in "ab":
        visadapt.inject(model, m=2, task=task, example=inputs)
    calls = counted(monkeypatch, ("traced_head",))
    facts = facts_of(model)
    facts._traced_head = None
    with torch.no_grad(), visadapt.using(model, ["a", "b", "a", "b"]):
        model(*inputs)
        tried = calls["traced_head"]
        for _ in range(3):
            model(*inputs)
    assert calls["traced_head"] == tried
    # what could not be guessed may be guessed now
    monkeypatch.setattr(Blocks, "forward", lambda self, x: self.fc(self.blocks[1](self.stem(x))))
    assert facts.look_for_head().modules == ("fc",)
