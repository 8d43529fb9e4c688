"""Problems by name: their data, and how they are identified."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import visadapt
from tests.cli.test_cli import tiny_bert
from tests.experiments.conftest import make_contender, small
from tests.experiments.test_compare import folder_of_digits
from visadapt import VisadaptError
from visadapt.experiments import ImageProblem, TextProblem, problem
from visadapt.experiments.problems import Problem
from visadapt.experiments.train import Workspace, measure
from visadapt.methods import Linear


def test_the_backbone_decides_between_images_and_texts() -> None:
    images = problem("bundled/resnet50", "cifar10", train=100, size=None)
    assert images == ImageProblem("bundled/resnet50", "cifar10", train=100)
    assert (images.name, images.backbone, images.modality, images.metric) == (
        "cifar10",
        "resnet50",
        "image",
        "accuracy",
    )
    texts = problem("bundled/minilm", "cola", root="there", length=48)
    assert texts == TextProblem("bundled/minilm", "cola", root="there", length=48)
    assert (texts.name, texts.backbone, texts.modality, texts.metric) == ("cola", "minilm", "text", "matthews")
    with pytest.raises(VisadaptError, match="ImageProblem has no option 'length'"):
        problem("bundled/resnet50", "cifar10", length=3)
    with pytest.raises(VisadaptError, match="no image data set or folder 'cifar'; did you mean 'cifar10'"):
        problem("bundled/resnet50", "cifar").load()


def test_splits_are_disjoint_and_always_the_same() -> None:
    first, again, fewer = (small(train=n).load() for n in (64, 64, 32))
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(again, split).inputs)
    assert [len(s) for s in (first.train, first.validation, first.test)] == [64, 50, 60]
    assert torch.equal(fewer.train.inputs, first.train.inputs[:32]), "a smaller subset is a part of the larger"
    held = small(train=None).load()
    assert len(held.train) + len(held.validation) == 1437
    images = {image.numpy().tobytes() for image in held.validation.inputs}
    assert len(images & {image.numpy().tobytes() for image in held.train.inputs}) < len(images) / 10


def test_a_problem_can_be_pickled_and_is_the_same_in_every_process() -> None:
    digits = small()
    assert digits.splits is small().splits, "the data is loaded once"
    assert pickle.loads(pickle.dumps(digits)) == digits
    assert small(size=32).described() != digits.described()
    state = digits.fresh().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, state[key]) for key, value in digits.fresh().state_dict().items())


def test_files_are_identified_by_their_contents(tmp_path: Path) -> None:
    one = folder_of_digits(tmp_path / "one", other=False)
    shutil.copytree(one, tmp_path / "elsewhere" / "same")
    two = folder_of_digits(tmp_path / "two", other=True)
    here, moved, other = (small(path).described() for path in (one, str(tmp_path / "elsewhere" / "same"), two))
    assert here == moved
    assert here != other
    assert str(tmp_path) not in str(here)
    assert small("same", root=str(tmp_path / "one")).described() == here


KINDS = {
    "accuracy": ((), ("red", "blue")),
    "pearson": ((("regression", True),), ("0.25", "1.5")),
    "mean_ap": ((("multi_label", "|"),), ("red|round", "blue")),
}
"""Usual metrics: what says that labels are of such a kind, and two of them."""


@pytest.mark.parametrize("metric", KINDS)
def test_tables_are_read_by_their_options_and_scored_by_what_their_labels_are(tmp_path: Path, metric: str) -> None:
    table, labels = KINDS[metric]
    for n in range(20):
        Image.new("L", (16, 12), 12 * n).save(tmp_path / f"{n}.png")
    lines = ["words;photo;mark", *(f"text {n};{n}.png;{labels[n % 2]}" for n in range(20))]
    (tmp_path / "marks.csv").write_text("\n".join(lines))
    columns = (("delimiter", ";"), ("label", "mark"), *table)
    sizes = {"train": None, "validation": 4, "test": None}
    images = small(str(tmp_path / "marks.csv"), table=(("image", "photo"), *columns), **sizes)
    tiny_bert(tmp_path / "bert")
    texts = TextProblem(f"hf/{tmp_path / 'bert'}", str(tmp_path / "marks.csv"), table=(("text", ("words",)), *columns))
    probe = make_contender(Linear(), "linear probe")
    for each in (images, texts):
        assert each.metric == metric
        assert "table" in each.described()
        assert any("held out for test" in remark for remark in each.splits.remarks)
        assert 0 <= abs(measure(probe.put(each, 0), each.name, each, "test", Workspace(tmp_path))) <= 1
    assert small().described().keys().isdisjoint(("table", "scored_by")), "older results keep their keys"
    other = "pearson" if metric != "pearson" else "accuracy"
    with pytest.raises(VisadaptError, match=f"labels must be .* for {other}, got"):
        _ = dataclasses.replace(images, scored_by=other).splits


def test_images_that_a_table_names_are_identified_by_their_contents(tmp_path: Path) -> None:
    facts = []
    for folder, shade in (("one", 3), ("same", 3), ("other", 4)):
        (tmp_path / folder).mkdir()
        for n in range(8):
            Image.new("L", (16, 16), shade * n).save(tmp_path / folder / f"{n}.png")
        rows = [f"{n}.png,{'red' if n % 2 else 'blue'}" for n in range(8)]
        (tmp_path / folder / "t.csv").write_text("\n".join(["file,label", *rows]))
        facts.append(small(str(tmp_path / folder / "t.csv"), train=None, validation=2, test=None).described())
    assert facts[0] == facts[1]
    assert facts[0] != facts[2]


def test_a_metric_must_exist_and_there_must_be_something_to_learn(tmp_path: Path) -> None:
    assert small(scored_by="macro_f1").described() == {**small().described(), "metric": "macro_f1"}
    with pytest.raises(VisadaptError, match="no metric 'loss'"):
        small(scored_by="loss")
    assert TextProblem("bundled/minilm", "mine/cola").metric == "accuracy", "a file of that name may hold anything"
    for n in range(8):
        Image.new("L", (16, 16), n).save(tmp_path / f"{n}.png")
    (tmp_path / "one.csv").write_text("file,label\n" + "".join(f"{n}.png,red\n" for n in range(8)))
    with pytest.raises(VisadaptError, match="must have at least two different labels to train on, got only 'red'"):
        _ = small(str(tmp_path / "one.csv"), train=None, validation=2, test=None).splits


def test_a_zip_file_equals_the_folder_in_it(tmp_path: Path) -> None:
    folder = folder_of_digits(tmp_path, other=False)
    file = shutil.make_archive(str(tmp_path / "signs"), "zip", tmp_path, "same")
    zipped, plain = (small(path, train=None, validation=20, test=None) for path in (file, folder))
    assert zipped.name == "signs"
    for split in ("train", "validation", "test"):
        left, right = (getattr(p.splits, split) for p in (zipped, plain))
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.labels, right.labels)


def test_images_are_cropped_to_squares_not_distorted(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :16] = pixels[:, 48:] = 255
    for split, count in (("train", 6), ("test", 2)):
        for name in "ab":
            (tmp_path / "v1.0" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels).save(tmp_path / "v1.0" / split / name / f"{i}.png")
    folder = ImageProblem("bundled/resnet50", str(tmp_path / "v1.0"), validation=2, size=16)
    assert folder.splits.test.inputs.shape == (4, 3, 16, 16)
    assert int(folder.splits.test.inputs.max()) < 128, "the white borders are cropped"
    assert folder.name == "v1-0"


def test_vgg16_from_a_file_of_its_convolutions(tmp_path: Path) -> None:
    import torchvision

    with torch.device("meta"):
        features = torchvision.models.vgg16().features.state_dict()
    state = {f"features.{k}": torch.full(v.shape, 0.01, dtype=torch.float16) for k, v in features.items()}
    save_file(state, tmp_path / "w.safetensors")
    vgg16 = ImageProblem(str(tmp_path / "w.safetensors"), "mnist", size=32)
    model = vgg16.fresh()
    assert vgg16.backbone == "vgg16"
    assert model.features[0].weight.dtype == torch.float32
    assert torch.equal(model.features[28].weight, state["features.28.weight"].float())
    visadapt.inject(model, m=4, task="t", num_classes=7)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert visadapt.summary(model)["t"].sites == 13
    del state["features.5.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(
        VisadaptError, match=r"does not contain the convolutions of VGG-16: features\.5\.bias is missing"
    ):
        ImageProblem(str(tmp_path / "cut.safetensors"), "mnist").fresh()
    with pytest.raises(VisadaptError, match=r"cannot read .*none\.safetensors: No such file"):
        ImageProblem(str(tmp_path / "none.safetensors"), "mnist").fresh()


def test_a_problem_of_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.models import SIZES

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(chr(97 + i) for i in range(26)),
        *(f"w{i}" for i in range(29)),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = tmp_path / "model"
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(model)
    transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).save_pretrained(model)
    for split, count in (("train", 40), ("dev", 12), ("test", 12)):
        folder = tmp_path / "data" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{'a' if i % 2 else 'b'} w{i % 29} w{3 * i % 29}\t{i % 2}" for i in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    toy: Problem = TextProblem(f"hf/{model}", str(tmp_path / "data" / "toy"), train=24, length=6)
    splits = toy.splits
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [24, 12, 12]
    assert splits.train.inputs["input_ids"].shape[1] <= 6
    assert toy.name == "toy"
    assert str(tmp_path) not in str(toy.described())
    assert toy.fresh().config.num_hidden_layers == 2
