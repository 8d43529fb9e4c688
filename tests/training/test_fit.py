"""``fit`` on a small real problem: it learns, keeps the best state, is reproducible and changes nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import visadapt
from tests.models import ZOO
from tests.training.conftest import backbone, state
from visadapt import VisadaptError
from visadapt.data import ImageSet, augment, normalize
from visadapt.methods import Full
from visadapt.training import Diverged, Recipe, evaluate, fit, predict

# without the head's own start: what is tested here is the loop
SHORT = Recipe(epochs=2, lr=1e-2, head_lr=3e-2, head_first=False)


def test_adapters_learn_digits_and_beat_the_frozen_features(injected: nn.Module, digits: ImageSet) -> None:
    before = evaluate(injected, "digits", digits.test)
    frozen = backbone(injected)
    result = fit(injected, "digits", digits.train, digits.test, Recipe(epochs=5, lr=3e-2, head_first=False))
    after = evaluate(injected, "digits", digits.test)
    losses = [epoch.loss for epoch in result.epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    assert after["loss"] < 0.6 * before["loss"]
    assert after["accuracy"] > 0.7 > 0.3 > before["accuracy"]
    assert after["accuracy"] == result.score
    assert result.steps == 5 * 10
    assert result.parameters == sum(p.numel() for p in visadapt.parameters(injected, "digits"))
    for name, tensor in backbone(injected).items():
        assert torch.equal(tensor, frozen[name]), name


def test_another_task_and_the_bare_backbone_give_the_same_outputs_as_before(
    injected: nn.Module, digits: ImageSet
) -> None:
    visadapt.inject(injected, m=4, task="other", num_classes=3, norms="full")
    answers = {task: predict(injected, task, digits.test.images) for task in ("other", "digits")}
    with visadapt.using(injected, None):
        bare = predict(injected, None, digits.test.images)
    fit(injected, "digits", digits.train, recipe=Recipe(epochs=1))
    assert torch.equal(predict(injected, "other", digits.test.images), answers["other"])
    assert not torch.equal(predict(injected, "digits", digits.test.images), answers["digits"])
    with visadapt.using(injected, None):
        assert torch.equal(predict(injected, None, digits.test.images), bare)
    assert visadapt.active(injected) == "other", "training does not change the active task"
    assert all(p.grad is None for p in injected.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(digits: ImageSet) -> None:
    def trained(seed: int) -> tuple[dict[str, Tensor], list[float]]:
        torch.manual_seed(1)
        model = visadapt.inject(
            ZOO["tiny/resnet"].make(), visadapt.Bottleneck(8, dropout=0.3), task="digits", num_classes=10
        )
        result = fit(model, "digits", digits.train, recipe=SHORT, seed=seed, augment=augment)
        return state(model), [epoch.loss for epoch in result.epochs]

    first, losses = trained(0)
    torch.manual_seed(99)
    torch.rand(7)
    again, same = trained(0)
    assert losses == same
    assert all(torch.equal(first[name], again[name]) for name in first)
    other, _ = trained(1)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_callers_random_state_and_mode_are_kept(injected: nn.Module, digits: ImageSet) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    for mode in (True, False):
        injected.train(mode)
        torch.manual_seed(5)
        fit(injected, "digits", digits.train, digits.test, Recipe(epochs=1))
        assert torch.equal(torch.rand(3), expected)
        assert injected.training is mode


class _Scripted(nn.Module):
    """A linear model with one parameter per class, for scripted validation scores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _Validation:
    """Ten samples per epoch, of which the model is right on the scripted fraction."""

    def __init__(self, model: nn.Module, scores: list[float]) -> None:
        self.model, self.scores = model, iter(scores)
        self.seen: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        self.seen.append(state(self.model))
        right = round(10 * next(self.scores))
        x = torch.ones(10, 1)
        guess = self.model(x).argmax(-1)
        yield x, torch.where(torch.arange(10) < right, guess, 1 - guess)


def test_the_best_epoch_is_kept_when_the_last_is_worse() -> None:
    scores = [0.2, 0.9, 0.5, 0.9, 0.1, 0.3]
    model = _Scripted()
    validation = _Validation(model, scores)
    data = (torch.randn(64, 1), torch.randint(2, (64,)))
    result = fit(model, None, data, validation, Recipe(epochs=6, lr=0.1))
    assert [epoch.score for epoch in result.epochs] == pytest.approx(scores)
    # of two equal epochs the earlier is kept
    assert result.best == 2
    assert result.score == pytest.approx(0.9)
    assert torch.equal(model.fc.weight, validation.seen[1]["fc.weight"])
    assert not torch.equal(model.fc.weight, validation.seen[-1]["fc.weight"])


def test_overfitting_keeps_the_best_state_of_a_real_task(injected: nn.Module, digits: ImageSet) -> None:
    # with shuffled labels, the validation loss rises from some epoch on
    wrong = digits.train.labels[torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))]
    data = (normalize(digits.train.images)[:64], wrong[:64])
    result = fit(
        injected, "digits", data, digits.test, Recipe(epochs=6, lr=3e-2, warmup=0, head_first=False), metric="loss"
    )
    scores = [epoch.score for epoch in result.epochs if epoch.score is not None]
    assert result.best < 6
    assert result.score == min(scores) < scores[-1]
    assert evaluate(injected, "digits", digits.test)["loss"] == result.score


def test_without_validation_the_last_state_is_kept(injected: nn.Module, digits: ImageSet) -> None:
    result = fit(injected, "digits", digits.train, recipe=SHORT)
    assert result.best == 2
    assert result.score is None
    assert "–" in str(result)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(injected: nn.Module, digits: ImageSet) -> None:
    images = normalize(digits.train.images)
    fit(injected, "digits", (images, digits.train.labels), recipe=Recipe(epochs=1))
    good = state(injected)
    broken = images.clone()
    broken[17] = float("nan")
    injected.train()
    with pytest.raises(Diverged, match=r"the loss became nan at step \d+ of 10; the last good state is kept"):
        fit(injected, "digits", (broken, digits.train.labels), recipe=Recipe(epochs=1, lr=0.1))
    assert all(torch.equal(good[name], tensor) for name, tensor in state(injected).items())
    assert injected.training
    assert all(p.grad is None for p in injected.parameters())


def test_a_failure_in_a_later_epoch_restores_the_best_epoch_before_it(injected: nn.Module, digits: ImageSet) -> None:
    images = normalize(digits.train.images)
    torch.manual_seed(3)
    twin = copy.deepcopy(injected)
    calls = 0

    def poison(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return batch * float("inf") if calls == 15 else batch

    recipe = Recipe(epochs=4, lr=1e-2, head_first=False)
    with pytest.raises(VisadaptError, match="at step 15 of 40"):
        fit(injected, "digits", (images, digits.train.labels), recipe=recipe, prepare=poison)

    class Enough(Exception):  # noqa: N818
        pass

    calls = 0

    def stop(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise Enough
        return batch

    with pytest.raises(Enough):
        fit(twin, "digits", (images, digits.train.labels), recipe=recipe, prepare=stop)
    expected, found = state(twin), state(injected)
    assert all(torch.equal(expected[name], found[name]) for name in expected), "not the state after the first epoch"


def test_gradients_are_clipped_to_the_recipes_norm() -> None:
    model = nn.Linear(4, 2)
    x, y = 1e3 * torch.randn(8, 4), torch.randint(2, (8,))
    norms: list[float] = []

    def watch(optimiser: Any, *_: Any) -> None:
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())

    handle = register_optimizer_step_pre_hook(watch)
    try:
        fit(model, None, (x, y), recipe=Recipe(epochs=1, grad_clip=0.5))
        fit(model, None, (x, y), recipe=Recipe(epochs=1, grad_clip=None))
    finally:
        handle.remove()
    assert norms[0] == pytest.approx(0.5, rel=1e-4)
    assert norms[1] > 100


def test_the_full_method_trains_exactly_as_ordinary_fine_tuning(digits: ImageSet) -> None:
    plain = ZOO["tiny/resnet"].make()
    torch.manual_seed(0)
    model = visadapt.inject(copy.deepcopy(plain), Full(), task="digits", num_classes=10, norms="full")
    torch.manual_seed(0)
    plain.fc = nn.Linear(plain.fc.in_features, 10)  # type: ignore[union-attr, arg-type]
    recipe = Recipe(epochs=2, lr=1e-3, head_lr=1e-2, head_first=False)
    injected = fit(model, "digits", digits.train, recipe=recipe)
    ordinary = fit(plain, None, digits.train, recipe=recipe)
    assert [epoch.loss for epoch in injected.epochs] == pytest.approx(
        [epoch.loss for epoch in ordinary.epochs], rel=1e-4
    )
    assert injected.parameters == ordinary.parameters
    a, b = predict(model, "digits", digits.test), predict(plain, None, digits.test)
    assert torch.allclose(a, b, atol=1e-2)


def test_tokens_train_as_images_do() -> None:
    model = visadapt.inject(ZOO["transformers/bert"].make(), m=4, task="topic", num_classes=2)
    ids = torch.randint(5, 50, (48, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(48) % 2
    ids[:, 3] = 55 + labels
    mask = (torch.arange(12) < torch.randint(6, 13, (48, 1))).long()
    data = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    result = fit(model, "topic", data, data, Recipe(epochs=12, lr=2e-2, batch_size=8))
    assert result.epochs[-1].loss < 0.5 * result.epochs[0].loss
    assert result.score == 1
    trimmed_or_not = [predict(model, "topic", data, prepare=p) for p in (None, lambda batch: batch)]
    assert torch.allclose(*trimmed_or_not, atol=1e-4)


def test_a_loader_and_tensors_in_its_order_train_alike(digits: ImageSet) -> None:
    images = normalize(digits.train.images)
    recipe = Recipe(epochs=1, head_first=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    losses = []
    for data in (
        (images, digits.train.labels),
        DataLoader(TensorDataset(images[order], digits.train.labels[order]), batch_size=32),
    ):
        torch.manual_seed(0)
        model = visadapt.inject(ZOO["tiny/resnet"].make(), m=8, task="digits", num_classes=10)
        losses.append(fit(model, "digits", data, recipe=recipe).epochs[0].loss)
    assert losses[0] == losses[1]


def test_bf16_autocast_learns_and_leaves_parameters_in_fp32(injected: nn.Module, digits: ImageSet) -> None:
    result = fit(injected, "digits", digits.train.subset(range(64)), recipe=SHORT, precision="bf16")
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert {p.dtype for p in visadapt.parameters(injected, "digits")} == {torch.float32}


def test_fit_inside_the_callers_own_accumulation(injected: nn.Module, digits: ImageSet) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=4)
    with accelerator.accumulate(nn.Linear(2, 2)):
        assert not accelerator.sync_gradients
    before = state(injected)
    fit(injected, "digits", digits.train.subset(range(32)), recipe=Recipe(epochs=1))
    moved = {name for name, tensor in state(injected).items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if name.endswith("up.weight")}


def test_label_smoothing_is_in_the_loss() -> None:
    model, (x, y) = nn.Linear(3, 4), (torch.randn(8, 3), torch.randint(4, (8,)))
    expected = F.cross_entropy(model(x), y, label_smoothing=0.2).item()
    result = fit(model, None, (x, y), recipe=Recipe(epochs=1, label_smoothing=0.2))
    assert result.epochs[0].loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("parts", [3, 100])
def test_a_batch_in_parts_moves_the_parameters_as_the_whole_does(digits: ImageSet, parts: int) -> None:
    sizes: list[int] = []

    def prepare(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return normalize(batch)

    def trained(accumulate: int) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = visadapt.inject(ZOO["tiny/resnet"].make(), m=8, task="digits", num_classes=10)
        data = digits.train.subset(range(40))
        result = fit(model, "digits", data, recipe=SHORT, augment=augment, accumulate=accumulate, prepare=prepare)
        return [epoch.loss for epoch in result.epochs], state(model)

    losses, expected = trained(1)
    assert sizes == [32, 8, 32, 8]
    sizes.clear()
    again, found = trained(parts)
    assert sizes == ([11, 11, 10, 3, 3, 2] * 2 if parts == 3 else [1] * 80)
    assert losses == pytest.approx(again, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_real_values_are_fitted_by_least_squares() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3
    model = nn.Linear(3, 1)
    before = F.mse_loss(model(x)[:, 0], y).item()
    recipe = Recipe(epochs=12, lr=0.1, batch_size=20, weight_decay=0)
    result = fit(model, None, (x[:160], y[:160]), (x[160:], y[160:]), recipe, metric="pearson")
    assert result.score == pytest.approx(1, abs=1e-3)
    found = evaluate(model, None, (x, y), ("pearson", "spearman", "loss"))
    assert found["spearman"] > 0.99
    assert found["loss"] == pytest.approx(F.mse_loss(model(x)[:, 0], y).item(), rel=1e-5)
    assert found["loss"] < 0.02 * before


def test_real_values_need_one_output_and_a_metric_for_real_values(injected: nn.Module, digits: ImageSet) -> None:
    data = normalize(digits.train.images), digits.train.labels.float()
    needs = r"the head must have 1 output for real-valued training labels, got 10 \(class indices must be integers\)$"
    with pytest.raises(VisadaptError, match=needs):
        fit(injected, "digits", data, data, metric="pearson")
    with pytest.raises(VisadaptError, match="labels must be one class per sample for accuracy, got real-valued"):
        fit(injected, "digits", data, data)
    with pytest.raises(VisadaptError, match=r"the head must have 1 output for real-valued training labels, got 2$"):
        fit(nn.Linear(3, 2), None, [(torch.zeros(4, 3), torch.zeros(4))])


def test_training_stops_after_patience_epochs_without_a_better_score() -> None:
    model, scores = _Scripted(), [0.2, 0.9, 0.5, 0.9, 0.1, 0.3]
    data = (torch.randn(64, 1), torch.randint(2, (64,)))
    result = fit(model, None, data, _Validation(model, scores), Recipe(epochs=6, lr=0.1, patience=2))
    assert [epoch.score for epoch in result.epochs] == pytest.approx(scores[:4])
    assert (result.best, result.steps) == (2, 8)
    with pytest.raises(VisadaptError, match="patience=2 needs validation data to score each epoch"):
        fit(model, None, data, recipe=Recipe(patience=2))


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("digit", {}, r"no task 'digit'; did you mean 'digits'\?"),
        (None, {}, "task must be a name for a model that has tasks, got None"),
        ("digits", {"recipe": {"lr": 1}}, "recipe must be a visadapt.training.Recipe, got dict"),
        ("digits", {"metric": "acuracy"}, r"no metric 'acuracy'; did you mean 'accuracy'\?"),
        ("digits", {"precision": "bf61"}, r"no precision 'bf61'; did you mean 'bf16'\?"),
        ("digits", {"checkpoint_every": 3}, "checkpoint_every=3 needs checkpoint=, the file to write"),
        ("digits", {"accumulate": 0}, "^accumulate .*positive int.*, got 0$"),
        ("digits", {"metric": "f1"}, "the head must have 2 classes for f1, got 10; macro_f1"),
        ("digits", {"device": "cpuu"}, "device 'cpuu' cannot be used here"),
        (
            "digits",
            {"train": (torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 10]))},
            "training labels must be from 0 to 9, the head's classes, got 10$",
        ),
        (
            "digits",
            {"train": (torch.zeros(2, 3, 16, 16), torch.tensor([0, -1]))},
            "training labels must be from 0 to 9, the head's classes, got -1$",
        ),
        (
            "digits",
            {"validation": (torch.zeros(1, 3, 16, 16), torch.tensor([11]))},
            "validation labels must be from 0 to 9, the head's classes, got 11$",
        ),
        (
            "digits",
            {"train": [(torch.zeros(2, 3, 16, 16), torch.tensor([0, 12]))]},
            "training labels must be from 0 to 9, the head's classes, got 12$",
        ),
        ("digits", {"train": None}, "training data must be a pair .*, got NoneType"),
    ],
)
def test_bad_requests_are_one_clear_error_and_change_nothing(
    injected: nn.Module, digits: ImageSet, task: Any, change: dict[str, Any], words: str
) -> None:
    before = state(injected)
    with pytest.raises(VisadaptError, match=words):
        fit(injected, task, **{"train": digits.train, **change})
    assert all(torch.equal(before[name], tensor) for name, tensor in state(injected).items())


def test_a_model_without_tasks_or_without_logits_is_refused(digits: ImageSet) -> None:
    plain = ZOO["tiny/resnet"].make()
    with pytest.raises(VisadaptError, match="has no tasks"):
        fit(plain, "digits", digits.train)
    with pytest.raises(VisadaptError, match="requires a gradient"):
        fit(plain.requires_grad_(False), None, digits.train)
    with pytest.raises(VisadaptError, match=r"logits of Conv2d must have shape \(N, classes\), got"):
        fit(nn.Conv2d(3, 1, 1), None, digits.train)


def test_the_history_prints_the_epoch_that_was_kept(injected: nn.Module, digits: ImageSet) -> None:
    result = fit(injected, "digits", digits.train, digits.test, SHORT, metric="macro_f1")
    lines = str(result).splitlines()
    assert "digits" in lines[0]
    assert f"{result.parameters:,}" in lines[0]
    assert "macro_f1" in lines[1]
    assert lines[0].endswith("; * is kept")
    assert [line.split()[0] for line in lines[1:] if "*" in line] == [str(result.best)]
    assert result.seconds == sum(epoch.seconds for epoch in result.epochs) > 0


def test_logits_that_are_not_finite_are_an_error(injected: nn.Module, digits: ImageSet) -> None:
    bias = next(p for p in visadapt.parameters(injected, "digits") if p.shape == (10,))
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            bias[3] = value
        for call, what in ((evaluate, "evaluation"), (predict, "prediction")):
            with pytest.raises(VisadaptError, match=f"task 'digits' gives .* logits for 120 of 120 {what} samples"):
                call(injected, "digits", digits.test)
    # a class that is ruled out
    with torch.no_grad():
        bias[3] = -float("inf")
    assert 3 not in predict(injected, "digits", digits.test).argmax(-1)


def test_a_task_that_was_frozen_is_refused(injected: nn.Module, digits: ImageSet) -> None:
    visadapt.inject(injected, m=2, task="other", num_classes=2)
    visadapt.trainable(injected, "other")
    with pytest.raises(VisadaptError, match=r"'digits' must require a gradient: call visadapt.trainable\(model"):
        fit(injected, "digits", digits.train, recipe=SHORT, progress=False)
    visadapt.trainable(injected, "digits")
    fit(injected, "digits", digits.train, recipe=SHORT, progress=False)
