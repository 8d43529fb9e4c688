"""Losses and metrics of the caller's own, and soft, multi-label, dense and real-valued targets."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelF1Score
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import visadapt
from tests.models import ZOO
from visadapt import VisadaptError
from visadapt.data import ImageSet, normalize
from visadapt.training import Recipe, evaluate, fit, predict
from visadapt.training.losses import Objective
from visadapt.training.scoring import Scores

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3] + 0.5 * X[:, 3:]).argmax(-1)
SEVERAL = X[:, :4] > 0
SHORT = Recipe(epochs=2, lr=1e-2, batch_size=16)


def linear(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, outputs)


def losses_of(data: Any, outputs: int = 3, **options: Any) -> list[float]:
    return [epoch.loss for epoch in fit(linear(outputs), None, data, recipe=SHORT, **options).epochs]


def test_a_function_with_the_named_loss_trains_as_the_name_does() -> None:
    expected = losses_of((X, Y))
    assert losses_of((X, Y), loss="cross_entropy") == expected
    # a mean, a module, and one loss per sample
    for own in (F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, reduction="none")):
        assert losses_of((X, Y), loss=own) == pytest.approx(expected, rel=1e-6)


def test_soft_targets_equal_classes_where_they_are_certain_and_label_smoothing_where_they_are_smooth() -> None:
    certain = F.one_hot(Y, 3).float()
    assert losses_of((X, certain), loss="cross_entropy") == pytest.approx(losses_of((X, Y)), rel=1e-5)
    smooth = 0.8 * certain + 0.2 / 3
    result = fit(linear(), None, (X, Y), recipe=SHORT.replace(label_smoothing=0.2))
    expected = [epoch.loss for epoch in result.epochs]
    assert losses_of((X, smooth), loss="cross_entropy") == pytest.approx(expected, rel=1e-5)


def test_several_labels_per_sample_are_learned() -> None:
    # booleans say what they mean, and floats are named
    first = losses_of((X, SEVERAL), 4)
    assert first == losses_of((X, SEVERAL.float()), 4, loss="bce")
    expected = F.binary_cross_entropy_with_logits(linear(4)(X), SEVERAL.float()).item()
    assert evaluate(linear(4), None, (X, SEVERAL), ("loss",))["loss"] == pytest.approx(expected, rel=1e-6)
    model = linear(4)
    metric = MultilabelF1Score(num_labels=4)
    result = fit(model, None, (X, SEVERAL), (X, SEVERAL), SHORT.replace(epochs=20, lr=0.1), metric=metric)
    assert result.metric == "MultilabelF1Score"
    assert result.score is not None
    assert result.score > 0.9 > 0.7 > evaluate(linear(4), None, (X, SEVERAL), (metric,))["MultilabelF1Score"]
    assert metric.update_count == 0, "the caller's metric was not touched"
    found = evaluate(model, None, (X, SEVERAL), ("micro_f1", "mean_ap"))
    assert found["micro_f1"] > 0.9
    assert found["mean_ap"] > 0.95


class Pixels(nn.Module):
    """Classes of pixels from their colours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x)}


def test_dense_labels_are_learned_and_ignored_positions_do_not_count() -> None:
    images = torch.randn(12, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    labels = (images[:, 0] > 0).long()
    partial = labels.clone()
    partial[:, 0] = -100
    model, before = Pixels(), evaluate(Pixels(), None, (images, labels))
    own = Objective().losses(model(images)["out"], partial)
    expected = F.cross_entropy(model(images)["out"][:, :, 1:], labels[:, 1:], reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(own, expected)
    result = fit(model, None, (images, partial), (images, labels), SHORT.replace(epochs=30, lr=0.1), metric="mean_iou")
    assert result.score is not None
    assert result.score > 0.9
    after = evaluate(model, None, (images, labels))
    assert after["accuracy"] > 0.9 > before["accuracy"]
    correct = model(images)["out"].argmax(1) == labels
    assert after["accuracy"] == pytest.approx(correct.float().mean().item())
    jaccard = evaluate(model, None, (images, labels), (MulticlassJaccardIndex(num_classes=2),))
    assert jaccard["MulticlassJaccardIndex"] == pytest.approx(result.score, abs=1e-6)
    assert predict(model, None, images).shape == (12, 2, 5, 4)


def test_a_segmentation_network_of_torchvision_trains_with_its_own_head() -> None:
    torch.manual_seed(0)
    plain = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    model = visadapt.inject(
        plain, m=4, task="dark", where="backbone.*", train_also="classifier", example=torch.zeros(1, 3, 32, 32)
    )
    images = torch.randn(4, 3, 32, 32)
    labels = (images.mean(1) > 0).long()
    result = fit(model, "dark", (images, labels), (images, labels), SHORT.replace(batch_size=2), metric="mean_iou")
    assert result.score is not None
    assert 0 < result.score <= 1


def test_one_real_value_meets_a_loss_and_a_metric_in_the_labels_shape() -> None:
    values = X @ torch.arange(6.0)
    shapes: set[tuple[torch.Size, torch.Size]] = set()

    def absolute(outputs: Tensor, labels: Tensor) -> Tensor:
        shapes.add((outputs.shape[1:], labels.shape[1:]))
        return (outputs - labels).abs()

    recipe = SHORT.replace(epochs=30, lr=0.3, schedule="constant")
    metric = torchmetrics.MeanAbsoluteError()
    result = fit(linear(1), None, (X, values), (X, values), recipe, loss=absolute, metric=metric)
    assert shapes == {(torch.Size(), torch.Size())}
    scores = [epoch.score for epoch in result.epochs if epoch.score is not None]
    assert result.score == min(scores) < 0.2 * scores[0]
    model = linear(2)
    pairs = torch.stack([values, -values], 1)
    result = fit(model, None, (X, pairs), recipe=recipe, loss="mse")
    assert result.epochs[0].loss > result.epochs[-1].loss


def test_a_function_as_a_metric_says_which_scores_are_better() -> None:
    def errors(outputs: Tensor, labels: Tensor) -> float:
        return float((outputs.argmax(-1) != labels).sum())

    errors.higher_is_better = False  # type: ignore[attr-defined]
    result = fit(linear(), None, (X, Y), (X, Y), SHORT.replace(epochs=4), metric=errors)
    assert result.metric == "errors"
    assert result.score == min(epoch.score for epoch in result.epochs if epoch.score is not None)
    batched = DataLoader(TensorDataset(X, Y), batch_size=7)
    found = evaluate(linear(), None, batched, ("accuracy", MulticlassAccuracy(3, average="micro"), errors))
    assert found["accuracy"] == pytest.approx(found["MulticlassAccuracy"])
    assert found["errors"] == round(48 * (1 - found["accuracy"]))


def test_the_metric_loss_is_the_callers_own_without_label_smoothing() -> None:
    def doubled(outputs: Tensor, labels: Tensor) -> Tensor:
        return 2 * F.cross_entropy(outputs, labels)

    once = evaluate(linear(), None, (X, Y), ("loss",), batch_size=7)["loss"]
    assert evaluate(linear(), None, (X, Y), ("loss",), loss=doubled, batch_size=7)["loss"] == pytest.approx(2 * once)
    recipe = SHORT.replace(label_smoothing=0.3)
    result = fit(model := linear(), None, (X, Y), (X, Y), recipe, metric="loss")
    assert result.score == evaluate(model, None, (X, Y), ("loss",))["loss"]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_in_parts_has_the_same_mean_loss(parts: int) -> None:
    found = losses_of((X, Y), loss=F.cross_entropy, accumulate=parts)
    assert found == pytest.approx(losses_of((X, Y)), rel=1e-5)


def other_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


def same_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "cross_entropy"}, "loss was .*, is cross_entropy"),
        ({"loss": None}, "loss was .*, is None"),
        ({"loss": other_loss}, "loss: function was .*same_loss, is .*other_loss"),
        ({"loss": nn.CrossEntropyLoss()}, "loss: "),
        ({"metric": "accuracy"}, "metric was .*, is accuracy"),
        ({"metric": MulticlassAccuracy(3, top_k=2)}, "metric: settings was"),
    ],
)
def test_a_resumed_run_with_another_loss_or_metric_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "run.checkpoint"

    def run(model: nn.Module, **changes: Any) -> Any:
        options: dict[str, Any] = {"loss": same_loss, "metric": MulticlassAccuracy(3), "checkpoint": file, **changes}
        return fit(model, None, (X, Y), (X, Y), SHORT, **options)

    first = run(linear())
    assert run(linear()) == first
    with pytest.raises(VisadaptError, match=f"another training run: {words}"):
        run(linear(), **change)


def test_what_a_loss_closes_over_and_holds_tells_runs_apart(tmp_path: Path) -> None:
    def weighted(weight: float) -> Any:
        return lambda outputs, labels: weight * F.cross_entropy(outputs, labels)

    file = tmp_path / "run.checkpoint"
    fit(linear(), None, (X, Y), recipe=SHORT, loss=weighted(0.5), checkpoint=file)
    fit(linear(), None, (X, Y), recipe=SHORT, loss=weighted(0.5), checkpoint=file)
    with pytest.raises(VisadaptError, match=r"another training run: loss: closure was \[0\.5\], is \[0\.25\]"):
        fit(linear(), None, (X, Y), recipe=SHORT, loss=weighted(0.25), checkpoint=file)
    file.unlink()
    weights = torch.tensor([1.0, 2.0, 3.0])
    fit(linear(), None, (X, Y), recipe=SHORT, loss=nn.CrossEntropyLoss(weights), checkpoint=file)
    with pytest.raises(VisadaptError, match="another training run: loss: tensors was"):
        fit(linear(), None, (X, Y), recipe=SHORT, loss=nn.CrossEntropyLoss(weights + 1), checkpoint=file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "crossentropy"}, r"no loss 'crossentropy'; did you mean 'cross_entropy'\?"),
        ({"loss": 3}, "loss must be one of cross_entropy, bce, mse or a function of outputs and labels, got int"),
        ({"metric": 3}, "metric must be a name, a torchmetrics.Metric or a function of outputs and labels, got int"),
        ({"train": (X, F.one_hot(Y).float())}, r"without loss=, labels must .*; got torch.float32 of \(48, 3\): name"),
        ({"train": (X, F.one_hot(Y))}, r"without loss=, labels must .*; got torch.int64 of \(48, 3\): name the loss"),
        (
            {"train": (X, SEVERAL)},
            r"outputs of Linear must have the shape of the training labels, \(16, 4\), got \(16, 3\)",
        ),
        (
            {"train": (X, 2 * F.one_hot(Y).float()), "loss": "cross_entropy"},
            r"training labels must be in \[0, 1\] for cross_entropy, got 0 to 2",
        ),
        (
            {"train": (X, torch.zeros(48, 2, 2).long())},
            r"logits of Linear must have shape \(N, classes, 2, 2\), got \(16, 3\)",
        ),
        (
            {"train": (X, torch.zeros(48, 2)), "loss": "mse"},
            r"outputs of Linear must have the shape of the training labels, \(16, 2\), got \(16, 3\)",
        ),
        ({"loss": lambda outputs, labels: 1.0}, r"loss must return one number, or one per sample \(16\), got float"),
        (
            {"loss": lambda outputs, labels: outputs.sum(0)},
            r"loss must return one number, or one per sample \(16\), got torch.float32 of \(3,\)",
        ),
        ({"loss": "mse", "recipe": SHORT.replace(label_smoothing=0.1)}, "label_smoothing=0.1 applies to the cross ent"),
        (
            {"validation": (X, Y), "metric": lambda outputs, labels: outputs},
            "the metric metric must give one number, g",
        ),
        (
            {"validation": (X, Y), "metric": "mean_ap"},
            "labels must be several per sample for mean_ap, got one class per sample",
        ),
        (
            {"train": (X, SEVERAL[:, :3]), "validation": (X, SEVERAL[:, :3])},
            "labels must be one class per sample for accuracy, got several per sample",
        ),
        (
            {"metric": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3)},
            "MulticlassConfusionMatrix does not say whether higher scores are better",
        ),
    ],
)
def test_losses_and_metrics_that_do_not_fit_are_one_clear_error(change: dict[str, Any], words: str) -> None:
    model = linear()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(VisadaptError, match=words):
        fit(model, None, **{"train": (X, Y), "recipe": SHORT, **change})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_labels_that_do_not_fit_a_known_head_are_refused_before_anything_runs(digits: ImageSet) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10)
    images = normalize(digits.train.images[:8])
    with pytest.raises(
        VisadaptError, match=r"training labels must be one column per output of the head, 10, got \(8, 4"
    ):
        fit(model, "digits", (images, torch.ones(8, 4).bool()))


def test_a_task_with_soft_targets_is_saved_and_gives_the_same(digits: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10)
    images, labels = normalize(digits.train.images[:64]), digits.train.labels[:64]
    soft = 0.9 * F.one_hot(labels, 10).float() + 0.01
    fit(model, "digits", (images, soft), (images, labels), SHORT, loss=soft_or_hard)
    visadapt.save(model, "digits", tmp_path / "digits.visadapt")
    again = ZOO["tiny/resnet"].make()
    visadapt.load(again, tmp_path / "digits.visadapt")
    assert torch.equal(predict(again, "digits", images), predict(model, "digits", images))


def soft_or_hard(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": nn.CrossEntropyLoss}, r"loss must be a function .*, got a class: CrossEntropyLoss\(\)"),
        ({"loss": lambda o, y: F.cross_entropy(o, y).detach()}, "loss must return a tensor with a gradient"),
        (
            {"loss": nn.CrossEntropyLoss(weight=torch.ones(2))},
            r"loss cannot take outputs float32 \(\d+, 3\) and labels int64 \(\d+,\): weight tensor",
        ),
        ({"loss": lambda o, y: F.cross_entropy(o, y) * float("nan")}, "the loss became nan at step 1"),
        ({"metric": dict}, r"metric must be an object or a function .*, got a class: dict\(\)"),
        (
            {"metric": lambda o, y: o @ y},
            r"the metric metric cannot take outputs float32 \(48, 3\) and labels int64 \(48,\)",
        ),
    ],
)
def test_functions_of_the_caller_that_do_not_fit_are_one_clear_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VisadaptError, match=words):
        fit(linear(), None, (X, Y), (X, Y), SHORT, **options)


def test_a_single_output_takes_a_column_or_a_vector_of_labels() -> None:
    outputs, real = torch.randn(6, 1), torch.randn(6)
    for labels in (real, real[:, None]):
        assert Objective().kind(labels) == "mse"
        assert torch.equal(Objective().losses(outputs, labels), F.mse_loss(outputs[:, 0], real, reduction="none"))
    yes = (real > 0).float()
    for labels in (yes, yes[:, None]):
        Objective("bce").check_labels(labels, 1, "training")
        Objective("bce").check(outputs, labels, "training", "net")
        wanted = F.binary_cross_entropy_with_logits(outputs[:, 0], yes, reduction="none")
        assert torch.equal(Objective("bce").losses(outputs, labels), wanted)
    with pytest.raises(VisadaptError, match=r"must have 1 output .*, got 3 \(class indices must be integers\)"):
        Objective().check_labels(torch.tensor([0.0, 1.0, 2.0]), 3, "training")


def test_labels_that_no_output_stands_for_are_not_counted_as_errors() -> None:
    outputs, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0] = 255
    scores = Scores(("accuracy",), Objective(nn.CrossEntropyLoss(ignore_index=255)))
    with pytest.raises(VisadaptError, match=r"from 0 to 2 for accuracy, got 255 \(-100 marks a position"):
        scores.update(outputs, labels)
    scores.update(outputs, labels.where(labels != 255, -100))
    assert 0 <= scores.compute()["accuracy"] <= 1


def test_numbers_of_numpy_are_scores() -> None:
    numpy = pytest.importorskip("numpy")
    scores = Scores((lambda o, y: numpy.float32(0.5),), Objective())
    scores.update(torch.randn(4, 3), torch.arange(4) % 3)
    assert scores.compute() == {"metric": 0.5}


@pytest.mark.parametrize("option", ["loss", "metric"])
def test_a_function_that_raises_without_a_message_is_named(option):
    def silent(outputs, labels):
        raise RuntimeError

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(VisadaptError, match=rf"{option}.* cannot take outputs float32 .*: RuntimeError$"):
        fit(nn.Linear(3, 2), None, (x, y), (x, y), **{option: silent})
