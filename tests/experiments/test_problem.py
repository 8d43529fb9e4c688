"""Problems by name: what is in them, what tells them apart."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import visadapt
from tests.experiments.conftest import small
from tests.experiments.test_compare import folder_of_digits
from visadapt import VisadaptError
from visadapt.experiments import ImageProblem, TextProblem, problem
from visadapt.experiments.problems import Problem


def test_a_problem_is_chosen_by_its_backbone() -> None:
    seen = problem("bundled/resnet50", "cifar10", train=100, size=None)
    assert seen == ImageProblem("bundled/resnet50", "cifar10", train=100)
    assert (seen.name, seen.backbone, seen.modality, seen.metric) == ("cifar10", "resnet50", "image", "accuracy")
    read = problem("bundled/minilm", "cola", root="there", length=48)
    assert read == TextProblem("bundled/minilm", "cola", root="there", length=48)
    assert (read.name, read.backbone, read.modality, read.metric) == ("cola", "minilm", "text", "matthews")
    with pytest.raises(VisadaptError, match="ImageProblem has no option 'length'"):
        problem("bundled/resnet50", "cifar10", length=3)
    with pytest.raises(VisadaptError, match="no image data set or folder 'cifar'; did you mean 'cifar10'"):
        problem("bundled/resnet50", "cifar").load()


def test_splits_are_apart_and_always_the_same() -> None:
    first, again, fewer = (small(train=n).load() for n in (64, 64, 32))
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(again, split).inputs)
    assert [len(s) for s in (first.train, first.validation, first.test)] == [64, 50, 60]
    assert torch.equal(fewer.train.inputs, first.train.inputs[:32]), "a smaller subset is a part of the larger"
    held = small(train=None).load()
    assert len(held.train) + len(held.validation) == 1437
    pictures = {image.numpy().tobytes() for image in held.validation.inputs}
    assert len(pictures & {image.numpy().tobytes() for image in held.train.inputs}) < len(pictures) / 10


def test_a_problem_travels_and_stays_itself() -> None:
    asked = small()
    assert asked.splits is small().splits, "data is read once"
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert small(size=32).described() != asked.described()
    state = asked.fresh().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, state[key]) for key, value in asked.fresh().state_dict().items())


def test_files_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    one = folder_of_digits(tmp_path / "one", other=False)
    shutil.copytree(one, tmp_path / "elsewhere" / "same")
    two = folder_of_digits(tmp_path / "two", other=True)
    here, moved, other = (small(path).described() for path in (one, str(tmp_path / "elsewhere" / "same"), two))
    assert here == moved
    assert here != other
    assert str(tmp_path) not in str(here)
    assert small("same", root=str(tmp_path / "one")).described() == here


def test_a_zip_file_is_the_folder_in_it(tmp_path: Path) -> None:
    folder = folder_of_digits(tmp_path, other=False)
    file = shutil.make_archive(str(tmp_path / "signs"), "zip", tmp_path, "same")
    zipped, plain = (small(path, train=None, validation=20, test=None) for path in (file, folder))
    assert zipped.name == "signs"
    for split in ("train", "validation", "test"):
        left, right = (getattr(p.splits, split) for p in (zipped, plain))
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.labels, right.labels)


def test_pictures_are_cropped_to_squares_and_not_squashed(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :16] = pixels[:, 48:] = 255
    for split, count in (("train", 6), ("test", 2)):
        for name in "ab":
            (tmp_path / "v1.0" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels).save(tmp_path / "v1.0" / split / name / f"{i}.png")
    asked = ImageProblem("bundled/resnet50", str(tmp_path / "v1.0"), validation=2, size=16)
    assert asked.splits.test.inputs.shape == (4, 3, 16, 16)
    assert int(asked.splits.test.inputs.max()) < 128, "the white borders are cut off"
    assert asked.name == "v1-0"


def test_vgg16_from_a_file_of_its_convolutions(tmp_path: Path) -> None:
    import torchvision

    with torch.device("meta"):
        wanted = torchvision.models.vgg16().features.state_dict()
    state = {f"features.{k}": torch.full(v.shape, 0.01, dtype=torch.float16) for k, v in wanted.items()}
    save_file(state, tmp_path / "w.safetensors")
    asked = ImageProblem(str(tmp_path / "w.safetensors"), "mnist", size=32)
    model = asked.fresh()
    assert asked.backbone == "vgg16"
    assert model.features[0].weight.dtype == torch.float32
    assert torch.equal(model.features[28].weight, state["features.28.weight"].float())
    visadapt.inject(model, m=4, task="t", num_classes=7)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert visadapt.summary(model)["t"].sites == 13
    del state["features.5.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(VisadaptError, match=r"no convolutions of VGG-16: features\.5\.bias is missing"):
        ImageProblem(str(tmp_path / "cut.safetensors"), "mnist").fresh()
    with pytest.raises(VisadaptError, match="cannot read the weights"):
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
        place = tmp_path / "data" / "toy"
        place.mkdir(parents=True, exist_ok=True)
        rows = [f"{'a' if i % 2 else 'b'} w{i % 29} w{3 * i % 29}\t{i % 2}" for i in range(count)]
        (place / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    asked: Problem = TextProblem(f"hf/{model}", str(tmp_path / "data" / "toy"), train=24, length=6)
    splits = asked.splits
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [24, 12, 12]
    assert splits.train.inputs["input_ids"].shape[1] <= 6
    assert asked.name == "toy"
    assert str(tmp_path) not in str(asked.described())
    assert asked.fresh().config.num_hidden_layers == 2
