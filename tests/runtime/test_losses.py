"""Losses within a forward of mixed tasks: the mean over what counts, the loss of each sample, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt
from tests.models import enliven, stir
from tests.runtime.builds import SIZES
from visadapt import VisadaptError

TASKS = ["a", "b", "b", "c", "a"]
IDS = torch.randint(3, 50, (5, 7), generator=torch.Generator().manual_seed(0))


def bert(kind: str, widths: tuple[int, int, int], problem: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, problem_type=problem)
    return injected(getattr(transformers, f"BertFor{kind}")(config), widths)


def injected(model: nn.Module, widths: tuple[int | None, ...], **options: Any) -> nn.Module:
    enliven(model).eval()
    for seed, (task, width) in enumerate(zip("abc", widths, strict=True)):
        visadapt.inject(model, m=3, task=task, num_classes=width, **options)
        stir(model, task, seed)
    return model


def of_task(model: nn.Module, task: str, **given: Any) -> tuple[list[int], Any]:
    index = [i for i, each in enumerate(TASKS) if each == task]
    with torch.no_grad(), visadapt.using(model, task):
        return index, model(**{key: value[index] for key, value in given.items()})


def mixed(model: nn.Module, **given: Any) -> Any:
    with torch.no_grad(), visadapt.using(model, TASKS):
        return model(**given)


def mean_of_tasks(model: nn.Module, counts: Tensor, **given: Any) -> Tensor:
    """The mean of the tasks' losses, weighed by what counts in each."""
    total = torch.zeros(())
    for task in "abc":
        index, out = of_task(model, task, **given)
        number = counts[index].sum()
        total += torch.where(number > 0, out.loss * number, torch.zeros(()))
    return total / counts.sum()


@pytest.mark.parametrize("whole", [False, True])
def test_labels_that_are_ignored_do_not_count(whole):
    model = bert("TokenClassification", (4, 4, 4))
    labels = torch.randint(0, 4, (5, 7), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = labels[2, 1:] = -100
    # nothing of one sample, or of a whole task
    labels[3 if whole else 1] = -100
    loss = mixed(model, input_ids=IDS, labels=labels).loss
    torch.testing.assert_close(loss, mean_of_tasks(model, labels != -100, input_ids=IDS, labels=labels))


def test_next_tokens():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=40, pad_token_id=0)
    model = injected(transformers.GPT2LMHeadModel(config), (None, None, None))
    labels = IDS.clone()
    labels[0, :4] = labels[4, 2:] = -100
    given = {"input_ids": IDS, "labels": labels}
    with torch.no_grad(), visadapt.using(model, TASKS):
        loss = model(**given, use_cache=False).loss
    torch.testing.assert_close(loss, mean_of_tasks(model, labels[:, 1:] != -100, **given))


def test_several_widths():
    model = bert("SequenceClassification", (2, 5, 3))
    given = {"input_ids": IDS, "labels": torch.tensor([1, 4, 3, 2, 0])}
    torch.testing.assert_close(mixed(model, **given).loss, mean_of_tasks(model, torch.ones(5), **given))


def test_several_labels_per_sample():
    model = bert("SequenceClassification", (3, 3, 3), "multi_label_classification")
    given = {"input_ids": IDS, "labels": (torch.arange(15).view(5, 3) % 2).float()}
    torch.testing.assert_close(mixed(model, **given).loss, mean_of_tasks(model, torch.ones(5), **given))


def test_different_kinds_of_loss_are_refused():
    model = bert("SequenceClassification", (1, 4, 3))
    with pytest.raises(VisadaptError, match=r"different kinds of loss.*visadapt\.split"):
        mixed(model, input_ids=IDS, labels=torch.tensor([0.0, 1, 1, 2, 0]))


class Own(nn.Module):
    """Gives its loss in a dict, beside the logits."""

    def __init__(self, reduction: str, shuffles: bool = False) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.reduction, self.shuffles = reduction, shuffles

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        order = x.mean((1, 2, 3)).argsort() if self.shuffles else torch.arange(len(x))
        h = torch.relu(self.stem(x[order]))
        logits = self.fc((h + self.conv(h)).mean((2, 3)))[order.argsort()]
        loss = F.cross_entropy(logits, y, ignore_index=0, reduction=self.reduction)
        return {"loss": loss, "logits": logits}


GIVEN = {
    "x": torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
    "y": torch.tensor([1, 3, 0, 2, 1]),
}


@pytest.mark.parametrize("shuffles", [False, True])
def test_the_loss_of_each_sample(shuffles):
    model = injected(Own("none", shuffles), (None, None, None), example=GIVEN)
    loss = mixed(model, **GIVEN)["loss"]
    for task in "abc":
        index, out = of_task(model, task, **GIVEN)
        torch.testing.assert_close(loss[index], out["loss"])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_loss_is_that_of_all_samples_or_refused(reduction):
    model = injected(Own(reduction), (None, None, None), example=GIVEN)
    found = mixed(model, **GIVEN)
    expected = F.cross_entropy(found["logits"], GIVEN["y"], ignore_index=0, reduction=reduction)
    torch.testing.assert_close(found["loss"], expected)
    apart = injected(Own(reduction, shuffles=True), (None, None, None), example=GIVEN)
    with pytest.raises(VisadaptError, match=r"one task at a time, and .*leave the labels out"):
        mixed(apart, **GIVEN)


class Detecting(nn.Module):
    """Takes a list of images, and gives nothing but the losses of them all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, targets):
        return {"loss": sum(self.norm(self.conv(x[None])).mean() * y for x, y in zip(images, targets, strict=True))}


def test_a_list_of_images_is_counted_by_its_images():
    """Each of them has three planes, which the message took for the size of the batch."""
    model, images = Detecting(), [torch.randn(3, 4, 4) for _ in range(2)]
    for task in "ab":
        visadapt.inject(model, m=1, task=task, where="conv", example=(images, [1.0, 2.0]))
    with (
        visadapt.using(model, ["a", "b"]),
        pytest.raises(VisadaptError, match="for a batch that Detecting does"),
    ):
        model(images, [1.0, 2.0])
