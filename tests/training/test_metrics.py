"""Metrics, against scikit-learn's on random logits and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from visadapt.training.metrics import METRICS, confusion


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(seed=st.integers(0, 10_000), count=st.integers(1, 60), classes=st.integers(2, 7))
def test_they_agree_with_scikit_learn(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    truth, guess = labels.numpy(), logits.argmax(-1).numpy()
    assert METRICS["accuracy"](logits, labels) == pytest.approx(reference.accuracy_score(truth, guess))
    assert METRICS["macro_f1"](logits, labels) == pytest.approx(reference.f1_score(truth, guess, average="macro"))
    assert METRICS["matthews"](logits, labels) == pytest.approx(reference.matthews_corrcoef(truth, guess), abs=1e-12)
    assert METRICS["loss"](logits, labels) == pytest.approx(
        reference.log_loss(truth, logits.double().softmax(-1).numpy(), labels=range(classes)), rel=1e-6
    )


def test_confusion_counts_true_class_by_row() -> None:
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 2])]
    assert confusion(logits, torch.tensor([0, 1, 2, 2])).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_top5_of_seven_and_of_three_classes() -> None:
    logits = torch.arange(7.0).repeat(7, 1)
    assert METRICS["top5"](logits, torch.arange(7)) == pytest.approx(5 / 7)
    assert METRICS["top5"](torch.randn(4, 3), torch.tensor([0, 1, 2, 0])) == 1
