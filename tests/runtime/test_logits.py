"""The logits of a mixed batch, taken apart along whatever axis their classes are on."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import visadapt
from tests.models import enliven, stir
from tests.runtime.builds import SIZES, Segmenter
from visadapt import VisadaptError, using

NAMES = ["b", None, "a", "b", "a"]


class Dense(nn.Module):
    """A map of classes on the last axis, from a linear."""

    def __init__(self, side):
        super().__init__()
        self.stem, self.fc, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), side

    def forward(self, x):
        return self.fc(self.stem(x)[:, :, : self.side, : self.side].relu().permute(0, 2, 3, 1))


def segmenter():
    return Segmenter(), lambda n: (torch.randn(n, 3, 12, 20),), 1


def square():
    # maps as large as the widest head
    return Segmenter(), lambda n: (torch.randn(n, 3, 12, 12),), 1


def last():
    return Dense(12), lambda n: (torch.randn(n, 3, 16, 16),), 3


def tokens():
    model = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**SIZES))
    return model, lambda n: (torch.randint(5, 50, (n, 12)),), 2


@pytest.mark.parametrize("build", [segmenter, square, last, tokens])
def test_each_tasks_rows_are_as_wide_as_its_head(build):
    torch.manual_seed(0)
    model, inputs, axis = build()
    enliven(model).eval()
    x = inputs(5)
    for seed, (task, width) in enumerate({"a": 12, "b": 3}.items()):
        where = "conv" if isinstance(model, Segmenter | Dense) else None
        visadapt.inject(model, m=2, task=task, num_classes=width, where=where, example=x)
        stir(model, task, seed)

    def logits(x):
        out = model(*x)
        return out if isinstance(out, torch.Tensor) else out["logits" if "logits" in out else "out"]

    with torch.no_grad():
        with using(model, NAMES):
            mixed = logits(x)
        found = visadapt.split(model, mixed, NAMES)
        assert list(found) == ["b", None, "a"]
        for task, rows in found.items():
            with using(model, task):
                alone = logits([each[[i for i, name in enumerate(NAMES) if name == task]] for each in x])
            torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-5)
        assert visadapt.split(model, mixed, NAMES, axis=axis)["b"].shape == found["b"].shape
        assert visadapt.split(model, mixed, NAMES, axis=axis - mixed.ndim)["b"].shape == found["b"].shape
        # what says nothing of the classes any more
        if mixed.shape.count(12) > 1:
            with pytest.raises(VisadaptError, match="say so by axis="):
                visadapt.split(model, mixed.softmax(axis), NAMES)
        with pytest.raises(VisadaptError, match=r"no axis of logits of shape .* is 12 wide"):
            visadapt.split(model, mixed[(slice(None), *[slice(5)] * (mixed.ndim - 1))], NAMES)
        for wrong in (0, 7, "1"):
            with pytest.raises(VisadaptError, match="axis must be one of 1 to"):
                visadapt.split(model, mixed, NAMES, axis=wrong)


def test_one_width_is_not_cut():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for task in "ab":
        visadapt.inject(model, m=2, task=task)
    ids = torch.randint(5, 50, (2, 60))
    with torch.no_grad(), using(model, ["a", "b"]):
        logits = model(ids, use_cache=False).logits
    assert visadapt.split(model, logits, ["a", "b"])["a"].shape == (1, 60, 50)
