"""Metrics, compared with those of scikit-learn and SciPy on random outputs, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from visadapt import VisadaptError
from visadapt.training.metrics import METRICS, check_metric


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(seed=st.integers(0, 10_000), count=st.integers(1, 60), classes=st.integers(2, 7))
def test_they_agree_with_scikit_learn(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    truth, guess = labels.numpy(), logits.argmax(-1).numpy()
    assert METRICS["accuracy"](logits, labels) == pytest.approx(reference.accuracy_score(truth, guess))
    macro = reference.f1_score(truth, guess, average="macro")
    assert METRICS["macro_f1"](logits, labels) == pytest.approx(macro, rel=1e-5)
    assert METRICS["loss"](logits, labels) == pytest.approx(
        reference.log_loss(truth, logits.double().softmax(-1).numpy(), labels=range(classes)), rel=1e-6
    )
    if classes == 2:
        f1 = reference.f1_score(truth, guess, zero_division=0)
        assert METRICS["f1"](logits, labels) == pytest.approx(f1, rel=1e-5)
    matthews = reference.matthews_corrcoef(truth, guess)
    assert METRICS["matthews"](logits, labels) == pytest.approx(matthews, abs=1e-6)


@given(seed=st.integers(0, 10_000), count=st.integers(3, 60))
def test_correlations_agree_with_scipy(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, 1, generator=generator)
    # with ties, which share their ranks
    values = (outputs[:, 0] + torch.randn(count, generator=generator)).round()
    assume(len(values.unique()) > 1)
    theirs = stats.pearsonr(outputs[:, 0].double(), values.double()).statistic
    assert METRICS["pearson"](outputs, values) == pytest.approx(theirs, abs=1e-6)
    theirs = stats.spearmanr(outputs[:, 0], values).statistic
    assert METRICS["spearman"](outputs, values) == pytest.approx(theirs, abs=1e-5)
    assert METRICS["loss"](outputs, values) == pytest.approx(((outputs[:, 0] - values) ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_correlation_with_constant_values_is_zero(classes: int) -> None:
    constant, labels = torch.eye(classes)[1].repeat(10, 1), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0, 1])
    assert METRICS["matthews"](constant, labels) == 0
    assert METRICS["matthews"](torch.eye(classes)[labels], torch.ones(10, dtype=torch.long)) == 0
    for name in ("pearson", "spearman"):
        assert METRICS[name](torch.ones(10, 1), torch.arange(10.0)) == 0
        assert METRICS[name](torch.arange(10.0)[:, None], torch.ones(10)) == 0


def test_top5_of_seven_and_of_three_classes() -> None:
    logits = torch.arange(7.0).repeat(7, 1)
    assert METRICS["top5"](logits, torch.arange(7)) == pytest.approx(5 / 7)
    assert METRICS["top5"](torch.randn(4, 3), torch.tensor([0, 1, 2, 0])) == 1


def test_a_metric_for_other_labels_is_refused() -> None:
    with pytest.raises(VisadaptError, match="labels must be one class per sample for accuracy, got real-valued"):
        check_metric("accuracy", torch.zeros(3))
    with pytest.raises(VisadaptError, match="labels must be real-valued for spearman, got one class per sample"):
        check_metric("spearman", torch.arange(3))
    with pytest.raises(VisadaptError, match=r"no metric 'pearsons'; did you mean 'pearson'"):
        check_metric("pearsons")
    check_metric("loss", torch.zeros(3))
    with pytest.raises(VisadaptError, match="the head must have 2 classes for f1, got 3; macro_f1"):
        METRICS["f1"](torch.zeros(2, 3), torch.tensor([0, 1]))
