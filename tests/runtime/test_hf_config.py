"""A transformers model computes the loss of the task that is meant: its number of labels, its kind of problem."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import visadapt
from visadapt.runtime import hf_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    visadapt.inject(model, m=4, task="five", num_classes=5, labels=list("abcde"))
    visadapt.inject(model, m=4, task="score", num_classes=1)
    return model


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (4, 7))


def test_each_task_has_its_own_loss(model, tokens):
    with visadapt.using(model, "five"):
        out = model(input_ids=tokens, labels=torch.tensor([4, 0, 1, 2]))
        assert torch.equal(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([4, 0, 1, 2])))
        assert model.num_labels == 5
        assert model.config.id2label[4] == "e"
    with visadapt.using(model, "score"):
        wanted = torch.randn(4)
        out = model(input_ids=tokens, labels=wanted)
        assert torch.equal(out.loss, torch.nn.functional.mse_loss(out.logits.squeeze(), wanted))
        assert model.config.problem_type == "regression"
    with visadapt.using(model, "five"):
        assert model.config.problem_type == "single_label_classification"
    with visadapt.using(model, None):
        assert model.config.num_labels == model.num_labels == 3
        assert model.config.problem_type is None


def test_a_forward_of_a_mixed_batch_looks_for_its_config_once(model, tokens, monkeypatch):
    count, plain = [], hf_config.mixed_config
    monkeypatch.setattr(hf_config, "mixed_config", lambda *args: count.append(args) or plain(*args))
    with visadapt.using(model, ["five", "score", "five", None]):
        model(input_ids=tokens)
        count.clear()
        model(input_ids=tokens)
        assert len(count) == 1
        # between forwards, what was changed since is seen
        model.config.num_labels = 7
        assert model.config.num_labels == 7


def test_eject_and_remove_leave_the_config_as_it_was(model):
    config = model.__dict__["config"]
    visadapt.remove(model, "score")
    assert model.config.num_labels == 3
    visadapt.eject(model)
    assert type(model) is BertForSequenceClassification
    assert model.config is config
    assert (config.num_labels, config.problem_type) == (3, None)


def test_a_merged_model_knows_its_labels(tokens):
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    visadapt.inject(model, visadapt.Bottleneck(4, activation=None), task="five", num_classes=5, labels=list("abcde"))
    plain = visadapt.merge(model, "five")
    assert plain.config.id2label[0] == "a"
    assert plain(input_ids=tokens, labels=torch.tensor([4, 0, 1, 2])).loss.isfinite()
    assert model.__dict__["config"].num_labels == 3


def test_save_pretrained_writes_the_backbones_config_whatever_task_is_active(model, tokens, tmp_path):
    with visadapt.using(model, None):
        expected = model(input_ids=tokens).logits
    visadapt.activate(model, "five")
    model.save_pretrained(tmp_path)
    assert model.config.num_labels == 5
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_labels == 3
    assert torch.equal(again(input_ids=tokens).logits, expected)


def tasks_of(*kinds):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    for name, (width, problem) in zip("ab", kinds, strict=True):
        visadapt.inject(model, m=4, task=name, num_classes=width)
        with visadapt.using(model, name):
            model.config.problem_type = problem
    return model


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (((1, "regression"), (3, "single_label_classification")), torch.tensor([0, 1, 2, 0])),
        (((3, "multi_label_classification"), (3, "single_label_classification")), torch.tensor([0, 1, 2, 0])),
        (((3, "multi_label_classification"), (5, "multi_label_classification")), torch.rand(4, 5)),
        (((1, "regression"), (2, "regression")), torch.rand(4, 2)),
        (((1, None), (3, None)), torch.tensor([0, 1, 2, 0])),
        (((3, "multi_label_classification"), (3, None)), torch.rand(4, 3)),
    ],
)
def test_tasks_with_different_kinds_of_loss_have_none_in_a_mixed_batch(kinds, labels, tokens):
    model = tasks_of(*kinds)
    with torch.no_grad(), visadapt.using(model, ["a", "b", "b", "a"]):
        assert model(input_ids=tokens).logits.shape == (4, max(width for width, _ in kinds))
        with pytest.raises(visadapt.VisadaptError, match="has no common loss: leave the labels out"):
            model(input_ids=tokens, labels=labels)


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (((3, None), (3, None)), torch.tensor([0, 1, -100, 0])),
        (((3, "multi_label_classification"),) * 2, torch.rand(4, 3)),
        (((1, "regression"),) * 2, torch.rand(4)),
        (((3, None), (5, "single_label_classification")), torch.tensor([0, 4, -100, 2])),
    ],
)
def test_a_loss_of_one_kind_is_that_of_all_samples(kinds, labels, tokens):
    model = tasks_of(*kinds)
    names = ["a", "b", "b", "a"]
    with torch.no_grad(), visadapt.using(model, names):
        out = model(input_ids=tokens, labels=labels)
    if labels.is_floating_point():
        losses = {1: torch.nn.functional.mse_loss, 2: torch.nn.functional.binary_cross_entropy_with_logits}
        expected = losses[labels.ndim](out.logits.squeeze(), labels)
    else:
        expected = torch.nn.functional.cross_entropy(out.logits, labels, ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)


def test_the_kind_of_loss_that_some_tasks_labels_show_is_not_that_of_others(tokens):
    model = tasks_of((3, None), (3, None))
    for name in "cd":
        visadapt.inject(model, m=4, task=name, num_classes=3)
    with torch.no_grad():
        with visadapt.using(model, ["a", "b", "b", "a"]):
            model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0]))
        with visadapt.using(model, ["c", "d", "d", "c"]):
            wanted = torch.rand(4, 3)
            out = model(input_ids=tokens, labels=wanted)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, wanted)
    torch.testing.assert_close(out.loss, expected)
