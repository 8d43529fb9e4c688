"""Facts of a backbone: established once per call, kept as long as they hold."""

import timm
import torch
from torch import nn

import visadapt
from visadapt.backbone import facts as module
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
