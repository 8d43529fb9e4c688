"""A new head starts as the linear probe, and a task does not end below it."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import squeezenet1_1

import visadapt
from tests.models import ZOO
from tests.training.conftest import backbone, state
from visadapt import VisadaptError
from visadapt.data import ImageFiles, ImageSet, normalize
from visadapt.data.targets import held_out
from visadapt.methods import Full, Linear
from visadapt.runtime.registry import registry_of
from visadapt.tensor_file import read_described, write_described
from visadapt.training import Fit, Recipe, evaluate, fit, head_first
from visadapt.training.checkpoint import KIND
from visadapt.training.head_first import KEPT, PENALTIES, fit_linear
from visadapt.training.losses import Objective

SHORT = Recipe(epochs=1, lr=1e-3)


def make(method: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"task": "digits", "num_classes": 10, **options}
    return visadapt.inject(ZOO["tiny/resnet"].make(), method or visadapt.Bottleneck(8), **options)


def data(digits: ImageSet, count: int = 200) -> tuple[Tensor, Tensor]:
    return normalize(digits.train.images[:count]), digits.train.labels[:count]


class Enough(Exception):  # noqa: N818
    """Ends a run."""


def started(model: nn.Module, train: Any, prepare: Any = None, **options: Any) -> None:
    """Leave a model as it is before the first step."""
    calls = iter(range(10**6))

    def stop(batch: Any) -> Any:
        if torch.is_grad_enabled():
            raise Enough
        next(calls)
        return batch if prepare is None else prepare(batch)

    with pytest.raises(Enough):
        fit(model, "digits", train, prepare=stop, **{"recipe": SHORT, **options})
    # an error of another kind leaves the model in train mode where it was
    model.eval()


def features(model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    parts = registry_of(model).parts("digits")
    head = next(own["head"] for own in parts.values() if "head" in own)
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[0]


def standardised(x: Tensor) -> Any:
    spread = x.double().std(0, correction=0)
    return ((x.double() - x.double().mean(0)) / spread.clamp(min=float(spread.square().mean().sqrt()))).numpy()


@pytest.mark.parametrize("method", [visadapt.Bottleneck(8), Full(), Linear()], ids=str)
def test_the_head_starts_as_a_regularised_logistic_regression(digits: ImageSet, method: Any) -> None:
    model = make(method, norms="frozen" if isinstance(method, Linear) else "affine")
    images, labels = data(digits)
    before = backbone(model)
    others = {n: p.clone() for n, p in visadapt.named_parameters(model, "digits") if ".head." not in n}
    z = standardised(features(model, images))
    result = fit(copy.deepcopy(model), "digits", (images, labels), recipe=SHORT)
    assert result.head_first.startswith("linear probe, loss ")
    assert "head first: linear probe" in str(result)
    model.eval()
    started(model, (images, labels))
    with torch.no_grad():
        logits = model(images)
    found = logits.double().softmax(-1)
    # with one of the penalties, the same probabilities as scikit-learn's
    distances = []
    for penalty in PENALTIES:
        reference = LogisticRegression(C=z.shape[1] / (penalty * len(z)), tol=1e-8, max_iter=5000).fit(z, labels)
        distances.append(float((found - torch.tensor(reference.predict_proba(z))).abs().max()))
    assert min(distances) < 1e-3
    assert all(torch.equal(t, before[name]) for name, t in backbone(model).items())
    assert all(torch.equal(p, others[n]) for n, p in visadapt.named_parameters(model, "digits") if n in others)


def test_it_starts_far_above_a_random_head(digits: ImageSet) -> None:
    images, labels = data(digits, 320)
    first = fit(make(), "digits", (images, labels), recipe=SHORT).epochs[0].loss
    drawn = fit(make(), "digits", (images, labels), recipe=SHORT.replace(head_first=False)).epochs[0].loss
    assert first < 0.6 * drawn


def test_a_task_does_not_end_below_its_own_probe(digits: ImageSet) -> None:
    images, labels = data(digits, 320)
    model = make()
    # so high a rate that every epoch spoils the start
    result = fit(model, "digits", (images, labels), digits.test, Recipe(epochs=2, lr=0.5, warmup=0))
    assert result.start is not None
    assert result.best == 0
    assert result.score == result.start == evaluate(model, "digits", digits.test)["accuracy"]
    assert all(epoch.score is not None and epoch.score < result.start for epoch in result.epochs)
    assert [line.split()[:2] for line in str(result).splitlines()[1:] if "*" in line] == [["0", "*"]]
    result = fit(make(), "digits", (images, labels), digits.test, Recipe(epochs=6, lr=1e-2, patience=6))
    assert result.start is not None
    assert result.score is not None
    assert result.best > 0
    assert result.score > result.start


def test_regression_soft_targets_several_labels_and_a_loss_of_ones_own(digits: ImageSet) -> None:
    images, labels = data(digits)
    values = labels.double()
    model = make(num_classes=1)
    z = standardised(features(model, images))
    started(model, (images, values))
    with torch.no_grad():
        found = model(images)[:, 0].double()
    distances = []
    for penalty in PENALTIES:
        reference = Ridge(alpha=penalty * len(z) / (2 * z.shape[1])).fit(z, values)
        distances.append(float((found - torch.tensor(reference.predict(z))).abs().max()))
    assert min(distances) < 1e-2
    hot = F.one_hot(labels, 10)
    for own, options in (
        (hot.bool(), {}),
        (hot.float(), {"loss": "cross_entropy"}),
        (labels, {"loss": nn.CrossEntropyLoss(weight=torch.ones(10))}),
    ):
        first = fit(make(), "digits", (images, own), recipe=SHORT, **options)
        assert first.head_first.startswith("linear probe")
        drawn = fit(make(), "digits", (images, own), recipe=SHORT.replace(head_first=False), **options)
        assert first.epochs[0].loss < 0.7 * drawn.epochs[0].loss


def other_head(model: nn.Module) -> nn.Module:
    head = next(own["head"] for own in registry_of(model).parts("digits").values() if "head" in own)
    nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    return model


def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return visadapt.inject(squeezenet1_1(num_classes=7), m=4, task="digits", num_classes=10)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make(num_classes=None, head="copy"), "no linear probe: the head is not new"),
        (lambda: make(num_classes=None, head="frozen"), "no linear probe: the head is not new"),
        (lambda: other_head(make()), "no linear probe: the head was changed since inject"),
        (squeezenet, "no linear probe: the head is not one linear layer"),
    ],
)
def test_where_the_head_cannot_start_so_the_result_says_why(digits: ImageSet, build: Any, words: str) -> None:
    model = build()
    model.eval()
    images = F.interpolate(normalize(digits.train.images[:40]), 32)
    result = fit(model, "digits", (images, digits.train.labels[:40] % 5), recipe=SHORT)
    assert result.head_first == words
    assert words in str(result)


def test_a_plain_model_and_a_task_that_was_trained_or_loaded_start_as_they_are(
    digits: ImageSet, tmp_path: Path
) -> None:
    images, labels = data(digits, 64)
    model = make()
    assert fit(model, "digits", (images, labels), recipe=SHORT).head_first.startswith("linear probe")
    assert fit(model, "digits", (images, labels), recipe=SHORT).head_first == (
        "no linear probe: the head was changed since inject"
    )
    visadapt.save(model, "digits", tmp_path / "digits.visadapt")
    again = ZOO["tiny/resnet"].make()
    visadapt.load(again, tmp_path / "digits.visadapt")
    expected = state(again)
    started(again, (images, labels))
    assert all(torch.equal(t, expected[name]) for name, t in state(again).items())
    plain = ZOO["tiny/resnet"].make()
    result = fit(plain, None, (images, labels), recipe=SHORT)
    assert result.head_first.startswith("no linear probe: whether the head of a plain model is new")
    assert fit(plain, None, (images, labels), recipe=SHORT.replace(head_first=False)).head_first == ""


def test_a_copy_of_a_new_model_is_as_new_and_a_loader_gives_the_same(digits: ImageSet) -> None:
    images, labels = data(digits, 64)
    expected = make()
    started(expected, (images, labels))
    copied = copy.deepcopy(make())
    started(copied, DataLoader(TensorDataset(images, labels), batch_size=20))
    for (name, a), b in zip(
        visadapt.named_parameters(expected, "digits"), visadapt.parameters(copied, "digits"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_cached_prefix_starts_its_head_too(digits: ImageSet) -> None:
    images, labels = data(digits, 64)
    model = make(where="layer4", norms="frozen")
    cached = visadapt.cache_prefix(model, "digits", images)
    result = fit(model, "digits", (cached.rows, labels), recipe=SHORT, prepare=cached)
    cached.prefix.close()
    plain = fit(make(where="layer4", norms="frozen"), "digits", (images, labels), recipe=SHORT)
    assert result.head_first == plain.head_first
    assert result.epochs[0].loss == pytest.approx(plain.epochs[0].loss, rel=1e-4)


def test_tokens_of_a_transformer(digits: ImageSet) -> None:
    torch.manual_seed(0)
    model = visadapt.inject(ZOO["transformers/bert"].make(), m=4, task="topic", num_classes=2)
    ids = torch.randint(5, 50, (192, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(192) % 2
    ids[:, 3] = 55 + labels
    train = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    result = fit(model, "topic", train, train, Recipe(epochs=1, lr=1e-4))
    assert result.head_first.startswith("linear probe")
    assert result.start is not None
    assert result.start > 0.7


def without_seconds(result: Fit) -> Fit:
    return dataclasses.replace(result, epochs=tuple(dataclasses.replace(e, seconds=0.0) for e in result.epochs))


@pytest.mark.parametrize("stop", [3, 5, 9, 14])
def test_a_stopped_run_resumes_with_the_same_bits(digits: ImageSet, tmp_path: Path, stop: int) -> None:
    """Per run: four batches of features, one of validation; then four steps and one validation per epoch."""
    images, labels = data(digits, 100)

    def run(model: nn.Module, calls: int = 0, **options: Any) -> Fit:
        left = calls

        def prepare(batch: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise Enough
            return batch

        held_out = normalize(digits.test.images[:40]), digits.test.labels[:40]
        recipe = SHORT.replace(epochs=2)
        return fit(model, "digits", (images, labels), held_out, recipe, prepare=prepare, metric="loss", **options)

    whole = run(model := make())
    file = tmp_path / "digits.checkpoint"
    with pytest.raises(Enough):
        run(make(), stop, checkpoint=file, checkpoint_every=1)
    resumed = make()
    assert without_seconds(run(resumed, checkpoint=file, checkpoint_every=1)) == without_seconds(whole)
    assert all(torch.equal(t, state(model)[name]) for name, t in state(resumed).items())


def test_a_checkpoint_of_an_earlier_version_resumes_as_it_began(digits: ImageSet, tmp_path: Path) -> None:
    images, labels = data(digits, 64)
    file = tmp_path / "digits.checkpoint"
    options: dict[str, Any] = {"recipe": SHORT.replace(epochs=2, head_first=False)}
    whole = fit(model := make(), "digits", (images, labels), **options)

    def stop(history: Fit) -> None:
        raise Enough

    with pytest.raises(Enough):
        fit(make(), "digits", (images, labels), checkpoint=file, log=stop, **options)
    content = read_described(file, KIND, "checkpoint")
    notes = content.description
    del notes["identity"]["recipe"]["head_first"], notes["run"]["head_first"], notes["run"]["start"]
    write_described(file, KIND, notes, content.tensors)
    resumed = make()
    result = fit(resumed, "digits", (images, labels), checkpoint=file, recipe=SHORT.replace(epochs=2))
    assert without_seconds(result) == without_seconds(whole)
    assert all(torch.equal(t, state(model)[name]) for name, t in state(resumed).items())
    with pytest.raises(VisadaptError, match="recipe: head_first was True, is False"):
        fit(make(), "digits", (images, labels), checkpoint=file, **options)


def test_features_that_vary_by_rounding_only_are_not_magnified() -> None:
    torch.manual_seed(0)
    features, labels = 3 + 1e-6 * torch.randn(60, 8), torch.arange(60) % 3
    head = nn.Linear(8, 3)
    fit_linear(head, features, labels, Objective(), 0)
    with torch.no_grad():
        assert float((head(features) - head(features + 1e-6)).abs().max()) < 1e-3


def test_the_same_features_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    choose = head_first._choose
    monkeypatch.setattr(head_first, "_SOLVED", type(head_first._SOLVED)())
    monkeypatch.setattr(head_first, "_choose", lambda *args: solved.append(args[2]) or choose(*args))
    features, labels = torch.randn(40, 6), torch.arange(40) % 3
    heads = [nn.Linear(6, 3) for _ in range(4)]
    losses = [
        fit_linear(head, features, labels, Objective(), seed) for head, seed in zip(heads, (0, 0, 1), strict=False)
    ]
    assert solved == [0, 1]
    assert losses[0] == losses[1]
    assert torch.equal(heads[0].weight, heads[1].weight)
    fit_linear(heads[3], features + 1e-3, labels, Objective(), 0)
    assert solved == [0, 1, 0]
    for seed in range(2, 3 + KEPT):
        fit_linear(heads[3], features, labels, Objective(), seed)
    assert len(head_first._SOLVED) == KEPT


def test_a_share_of_the_training_data_held_back_keeps_a_task_above_its_probe(digits: ImageSet) -> None:
    images, labels = data(digits, 320)
    # so high a rate that every epoch spoils the start
    recipe = Recipe(epochs=2, lr=0.5, warmup=0)
    result = fit(make(), "digits", (images, labels), 0.25, recipe)
    assert (result.best, result.steps) == (0, 2 * -(-240 // recipe.batch_size))
    left, chosen = held_out(labels, 80, 0)
    by_hand = fit(make(), "digits", (images[left], labels[left]), (images[chosen], labels[chosen]), recipe)
    assert without_seconds(result) == without_seconds(by_hand)
    expected, found = make(), make()
    fit(expected, "digits", (images, labels), 0.25, SHORT, seed=3)
    fit(found, "digits", digits.train, 0.25, SHORT, seed=3)
    assert all(torch.equal(t, state(expected)[name]) for name, t in state(found).items())


def test_files_and_rows_of_a_cached_prefix_are_held_back_too(digits: ImageSet) -> None:
    whole = digits.train.subset(range(60))
    files = fit(make(), "digits", ImageFiles(whole.images, whole.labels), 0.2, SHORT)
    tensors = fit(make(), "digits", whole, 0.2, SHORT)
    assert files.start == tensors.start
    model = make(where="layer4", norms="frozen")
    cached = visadapt.cache_prefix(model, "digits", normalize(whole.images))
    rows = fit(model, "digits", (cached.rows, whole.labels), 0.2, SHORT, prepare=cached)
    cached.prefix.close()
    assert rows.start == fit(make(where="layer4", norms="frozen"), "digits", whole, 0.2, SHORT).start


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation": 1.0}, r"validation must be data or a fraction in \(0, 1\), got 1.0"),
        ({"validation": 0}, r"validation must be data or a fraction in \(0, 1\), got 0"),
        ({"validation": -0.1}, r"validation must be data or a fraction in \(0, 1\), got -0.1"),
        ({"validation": float("nan")}, "validation must be a finite number, got nan"),
        ({"validation": True}, r"validation must be data or a fraction in \(0, 1\), got True"),
        (
            {"train": (torch.randn(1, 3, 16, 16), torch.tensor([1]))},
            "training data must have at least two samples for validation=0.2, got 1",
        ),
        ({"train": torch.randn(4, 3, 16, 16)}, "the training data has no labels"),
        ({"train": (torch.randn(4, 3, 16, 16), torch.tensor([1, -1, 0, 2]))}, "training labels must be from 0 to 9"),
        (
            {"train": DataLoader(TensorDataset(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])))},
            "training data must be tensors or a data set for validation=0.2, got a DataLoader: split its data set, "
            "such as with torch.utils.data.random_split",
        ),
    ],
)
def test_what_cannot_be_held_back_is_one_clear_error(digits: ImageSet, change: dict[str, Any], words: str) -> None:
    model = make()
    before = state(model)
    call = {"train": data(digits, 20), "validation": 0.2, **change}
    with pytest.raises(VisadaptError, match=words):
        fit(model, "digits", recipe=SHORT, **call)
    assert all(torch.equal(t, before[name]) for name, t in state(model).items())


def test_a_loss_that_is_not_a_number_is_told_by_training_not_by_the_solver(digits: ImageSet) -> None:
    model, train = make(), data(digits, 40)
    with pytest.raises(VisadaptError, match="the loss became nan at step 1"):
        fit(model, "digits", train, recipe=SHORT, loss=lambda o, y: F.cross_entropy(o, y) * float("nan"))


class Noisy(nn.Module):
    """Features that hardly differ between samples, and dropout that changes all of them."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, outputs)
        nn.init.ones_(self.body.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(1e-2 * self.body(x) + 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("outputs", [3, 1])
def test_a_head_does_not_magnify_dropout(outputs: int) -> None:
    torch.manual_seed(0)
    model = visadapt.inject(Noisy(3), visadapt.Bottleneck(1), task="t", num_classes=outputs, where=["body"])
    x = torch.randn(40, 4)
    y = x[:, :3].argmax(-1) if outputs == 3 else 50 + x[:, 0]
    short = Recipe(epochs=1, lr=1e-6, batch_size=40)
    metric = "accuracy" if outputs == 3 else "loss"
    result = fit(model, "t", (x, y), (x, y), short, metric=metric, progress=False)
    assert re.fullmatch(r"linear probe, loss [\d.]+ before scaling by [\d.e-]+ for dropout", result.head_first)
    assert result.start is not None
    if outputs == 3:
        assert result.start > 0.7, "no decision is another one"
        assert result.epochs[0].loss < 1.5 * math.log(3)
    else:
        assert result.start < 1.1 * float(y.var()), "the mean is kept"
        assert result.epochs[0].loss < 3 * float(y.var())


def test_a_head_on_features_that_dropout_leaves_apart_is_the_probe() -> None:
    torch.manual_seed(0)
    model = visadapt.inject(Noisy(3), visadapt.Bottleneck(1), task="t", num_classes=3, where=["body"])
    model.dropout.p = 0.001
    x = torch.randn(40, 4)
    before = torch.get_rng_state()
    result = fit(model, "t", (x, x[:, :3].argmax(-1)), recipe=SHORT, progress=False)
    assert re.fullmatch(r"linear probe, loss [\d.]+", result.head_first)
    assert torch.equal(before, torch.get_rng_state())
