"""Batches from every form of data, and the forms that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from visadapt import VisadaptError
from visadapt.data import ImageSplit, TextSplit, normalize
from visadapt.training import Recipe, Samples, ready, tokenised, trimmed
from visadapt.training.augmenting import training_batches
from visadapt.training.batches import Batches, held_back

X, Y = torch.arange(10.0).view(10, 1), torch.arange(10) % 3


class Rows(Dataset[Any]):
    """Samples that are read one by one."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        Samples(X, Y),
        {"x": X, "labels": Y},
        ({"x": X}, Y),
        (X.numpy(), Y.numpy()),
        (X, Y.tolist()),
        (X, Y.int()),
        (X, Y.to(torch.uint8)),
        TensorDataset(X, Y),
        Subset(TensorDataset(X, Y), range(10)),
        Rows(lambda i: (X[i], int(Y[i]))),
        Rows(lambda i: {"x": X[i].numpy(), "labels": Y[i]}),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [(X[:4], Y[:4]), (X[4:8], Y[4:8]), ({"x": X[8:]}, Y[8:])],
        [{"x": X[:4], "labels": Y[:4]}, {"x": X[4:8], "labels": Y[4:8]}, {"x": X[8:], "labels": Y[8:]}],
    ],
    ids=[
        "tuple",
        "list",
        "samples",
        "mapping",
        "pair of mapping",
        "arrays",
        "list of labels",
        "int32",
        "uint8",
        "tensor data set",
        "subset",
        "pairs one by one",
        "mappings one by one",
        "loader",
        "batches",
        "mappings",
    ],
)
def test_every_form_gives_the_same_batches(data: Any) -> None:
    batches = Batches(data, 4, "training")
    assert len(batches) == 3
    seen = list(batches.epoch())
    inputs = torch.cat([x["x"] if isinstance(x, dict) else x for x, _, _ in seen])
    assert torch.equal(inputs, X)
    assert torch.equal(torch.cat([y for _, y, _ in seen]), Y)  # type: ignore[misc]
    assert [len(y) for _, y, _ in seen] == [4, 4, 2]  # type: ignore[arg-type]
    assert [rows for _, _, rows in seen] == [4, 4, 2]
    assert len(list(batches.epoch())) == 3, "a second epoch is as long as the first"


def test_shuffling_keeps_inputs_and_labels_together_and_follows_the_generator() -> None:
    batches = Batches((X, Y), 4, "training")
    orders = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        seen = list(batches.epoch(generator))
        x, y = torch.cat([x for x, _, _ in seen]), torch.cat([y for _, y, _ in seen])  # type: ignore[misc]
        assert torch.equal(x[:, 0].long() % 3, y)
        assert torch.equal(x.sort(0).values, X)
        orders.append(x[:, 0].tolist())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("count", "processes"), [(10, 2), (10, 3), (9, 2), (2, 3), (1, 4)])
def test_the_parts_of_all_processes_begin_with_the_whole_batch(count: int, processes: int) -> None:
    whole = list(Batches((X[:count], Y[:count]), 4, "training").epoch())
    parts = []
    for rank in range(processes):
        batches = Batches((X[:count], Y[:count]), 4, "training")
        batches.rank, batches.processes = rank, processes
        parts.append(list(batches.epoch()))
    for step, (x, y, rows) in enumerate(whole):
        shares = [part[step] for part in parts]
        assert len({len(share.inputs) for share in shares}) == 1
        assert torch.equal(torch.cat([share.inputs for share in shares])[:rows], x)
        assert torch.equal(torch.cat([share.labels for share in shares])[:rows], y)  # type: ignore[misc, arg-type]
        assert {share.rows for share in shares} == {rows}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X, Y[:5]), "5 labels for 10 inputs"),
        ((X, ["a", "b"] * 5), "training labels must be numbers, got names such as 'a': number the classes"),
        (Endless(), "training data must have a known number of samples, got Endless: give a data set with __len__"),
        (DataLoader(Endless(), 2), "known number of batches, got a DataLoader without one: give its IterableDataset a"),
        ((X, Y.bool()), r"labels must be class indices \(int64\)"),
        ((X, Y[:, None]), r"of \(10, 1\)"),
        (({"a": X, "b": X[:3]}, Y), "inputs must have one length, got 3, 10"),
        ((X[:0], Y[:0]), "the training data is empty"),
        ([], "the training data is empty"),
        (X, "the training data has no labels"),
        ({"x": X}, "the training data has no labels"),
        ({"labels": Y}, "training data must map argument names to tensors, got labels only"),
        ({"x": [1, 2], "labels": Y}, "training data must map argument names to tensors, got x: list"),
        (None, "training data must be a pair .*, got NoneType"),
        ("cifar10", "training data must be a pair .*, got str"),
        (iter([(X, Y)]), "training data must be a pair .*, got list_iterator"),
        (TextSplit(["a", "b"], torch.tensor([0, 1])), "visadapt.training.tokenised"),
    ],
)
def test_unusable_data_is_refused(data: Any, words: str) -> None:
    with pytest.raises(VisadaptError, match=words):
        Batches(data, 4, "training")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((X, Y, Y), "got a tuple of Tensor, Tensor, Tensor"),
        ({"x": X, "label": Y}, r"got a dict of 'x', 'label' \(the labels must be called 'labels'\)"),
        (([1, 2], Y), "got a tuple of list, Tensor: inputs must be tensors"),
    ],
)
def test_a_batch_of_another_form_is_described(batch: Any, words: str) -> None:
    with pytest.raises(VisadaptError, match=words):
        list(Batches([batch, batch, batch], 4, "training").epoch())


def test_samples_of_a_data_set_that_make_no_batch_are_refused() -> None:
    for sample, words in (
        ((object(), 1), "default_collate: batch must contain"),
        ((X[0], "a"), "got names such as 'a'"),
    ):
        with pytest.raises(VisadaptError, match=words):
            list(Batches(Rows(lambda i, sample=sample: sample), 4, "training").epoch())


def test_a_data_set_is_shuffled_by_the_seed_and_split_without_being_read() -> None:
    read: list[int] = []
    rows = Rows(lambda i: (read.append(i), (X[i], int(Y[i])))[1])
    orders = []
    for seed in (0, 0, 1):
        loader = training_batches(rows, Recipe(batch_size=4), None, seed)
        orders.append([int(x) for inputs, _ in loader for x in inputs])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10))
    read.clear()
    left, chosen = held_back(rows, 0.3, 0)
    assert not read
    assert (len(left), len(chosen)) == (7, 3)
    assert sorted([int(x) for x, _ in left] + [int(x) for x, _ in chosen]) == list(range(10))
    pair = held_back(TensorDataset(X, Y), 0.3, 0)
    assert [part.labels.tolist() for part in pair] == [part.labels.tolist() for part in held_back((X, Y), 0.3, 0)]


def test_data_sets_of_the_datasets_library_are_read_as_tensors() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": X.tolist(), "labels": Y.tolist()})
    for data in (rows, rows.with_format("torch")):
        (inputs, labels, _), *_ = Batches(data, 10, "training").epoch()
        assert torch.equal(inputs["x"], X)
        assert torch.equal(labels, Y)
        for part in held_back(data, 0.3, 0):
            (inputs, labels, _), *_ = Batches(part, 10, "training").epoch()
            assert torch.equal(inputs["x"][:, 0].long() % 3, labels)


@pytest.mark.parametrize("batch", [X, (X,), "ab", {"x": X}])
def test_a_loader_of_something_else_is_refused_at_its_first_batch(batch: Any) -> None:
    with pytest.raises(VisadaptError, match="a batch of the training data must be a pair of inputs and labels, got"):
        list(Batches([batch, batch, batch], 4, "training").epoch())


def test_uint8_images_are_normalised_and_floats_are_not() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(ready(images), normalize(images))
    assert ready(X) is X
    split = ImageSplit(images, torch.tensor([0, 1]))
    inputs, labels, _ = next(Batches(split, 2, "training").epoch())
    assert torch.equal(inputs, images)
    assert torch.equal(labels, split.labels)  # type: ignore[arg-type]


def test_only_columns_of_padding_are_trimmed() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    ids = torch.arange(10).view(2, 5)
    cut = trimmed({"input_ids": ids, "attention_mask": mask, "other": torch.zeros(2)})
    assert cut["input_ids"].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert cut["attention_mask"].tolist() == [[1, 1, 0], [0, 1, 1]]
    assert cut["other"].shape == (2,)
    all_padding = {"attention_mask": torch.zeros(2, 5)}
    assert trimmed(all_padding) is all_padding
    right = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]), "input_ids": torch.arange(7)[None]}
    assert trimmed(right, multiple=4)["input_ids"].tolist() == [[0, 1, 2, 3]]
    left = {name: tensor.flip(1) for name, tensor in right.items()}
    assert trimmed(left, multiple=5)["input_ids"].tolist() == [[4, 3, 2, 1, 0]]
    assert trimmed(right, multiple=8)["input_ids"].tolist() == [list(range(7))]
    # on an accelerator, to find out would wait for it
    elsewhere = {name: tensor.to("meta") for name, tensor in right.items()}
    assert trimmed(elsewhere) is elsewhere


class _Tokenizer:
    """Maps words to their lengths, with the interface of transformers' tokenizers."""

    pad_token = "[PAD]"

    def __call__(self, *columns: list[str], max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
        rows = [[len(w) for side in row for w in side.split()][:max_length] for row in zip(*columns, strict=True)]
        longest = max(len(row) for row in rows)
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


def test_texts_and_pairs_are_tokenised() -> None:
    samples = tokenised(_Tokenizer(), TextSplit(["a bb", "ccc a dddd a"], torch.tensor([0, 1])), max_length=3)
    assert isinstance(samples.inputs, dict)
    assert samples.inputs["input_ids"].tolist() == [[1, 2, 0], [3, 1, 4]]
    pairs = tokenised(_Tokenizer(), TextSplit([("a bb", "ccc"), ("a", "bb")], torch.tensor([0, 1])))
    assert isinstance(pairs.inputs, dict)
    assert pairs.inputs["input_ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    with pytest.raises(VisadaptError, match="texts to tokenise must not be empty"):
        tokenised(_Tokenizer(), TextSplit([], torch.tensor([], dtype=torch.int64)))
