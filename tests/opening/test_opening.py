"""From a task file to predictions in a few lines, for images and for texts."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import visadapt
from visadapt import VisadaptError
from visadapt.data.inputs import ImageInputs, TextInputs, described
from visadapt.runtime.registry import tasks

SMALL = {"pretrained": False, "channels": [8, 16, 24, 32]}
LABELS = ("iris", "lily", "rose")
pytest.importorskip("timm")


def flowers(name: str = "flowers", size: int = 32, labels: tuple[str, ...] = LABELS, seed: int = 1) -> nn.Module:
    """A small ResNet with a task whose head is not trivial."""
    torch.manual_seed(0)
    model = visadapt.inject("timm/resnet18", m=2, task=name, labels=labels, num_classes=len(labels), **SMALL).eval()
    tasks(model)[name].notes["inputs"] = described(ImageInputs(size))
    return stirred(model, name, seed)


def stirred(model: nn.Module, name: str, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def second(model: nn.Module, name: str = "birds", size: int = 32) -> nn.Module:
    visadapt.inject(model, m=2, task=name, num_classes=5, labels=list("abcde"))
    tasks(model)[name].notes["inputs"] = described(ImageInputs(size))
    return stirred(model.eval(), name, 2)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(file)
    return files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return visadapt.save(flowers(), "flowers", tmp_path / "flowers.visadapt")


def test_a_file_says_its_backbone_where_it_was_loaded_by_name(saved: Path) -> None:
    notes = visadapt.task_file.read(saved).description["notes"]
    assert notes["backbone"] == {"name": "timm/resnet18", "build": SMALL}


def test_open_gives_the_backbone_with_its_task(saved: Path, photos: list[Path]) -> None:
    # the backbone of `inject` was drawn from the same seed
    model = visadapt.open(saved)
    assert not model.training
    assert visadapt.active(model) == "flowers"
    assert tasks(model)["flowers"].origin == str(saved)
    prepare = visadapt.preprocess(model)
    batch = prepare(photos)
    assert torch.equal(batch, ImageInputs(32)(ImageInputs(32).read(photos)))
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(logits, flowers()(batch))
    found = visadapt.predict(model, photos, "flowers", top=3)
    assert [p.label for p in found] == [LABELS[i] for i in logits.argmax(-1)]
    torch.testing.assert_close(
        torch.tensor([p.probabilities for p in found]), logits.softmax(-1).sort(-1, descending=True).values
    )


def test_paths_images_and_a_single_one_are_the_same(saved: Path, photos: list[Path]) -> None:
    prepare = visadapt.preprocess(visadapt.open(str(saved)), "flowers")
    opened = [Image.open(photo) for photo in photos]
    assert torch.equal(prepare(photos), prepare(opened))
    assert torch.equal(prepare(str(photos[0])), prepare(opened[0]))
    assert prepare(opened[0]).shape == (1, 3, 32, 32)


def test_several_files_share_one_backbone(tmp_path: Path, photos: list[Path]) -> None:
    model = second(flowers())
    files = [visadapt.save(model, name, tmp_path / f"{name}.visadapt") for name in ("flowers", "birds")]
    again = visadapt.open(files)
    assert list(tasks(again)) == ["flowers", "birds"]
    assert visadapt.active(again) == "flowers"
    for name in ("flowers", "birds"):
        assert visadapt.predict(again, photos, name) == visadapt.predict(model, photos, name)


@pytest.mark.parametrize("size", [32, 24])
def test_a_list_names_the_task_of_each_input(photos: list[Path], size: int) -> None:
    """Where the tasks prepare images in different ways, too."""
    model = second(flowers(), size=size)
    names = ["birds", "flowers", "birds", "birds", "flowers"]
    found = visadapt.predict(model, photos, names, top=5, batch_size=2)
    assert [p.task for p in found] == names
    for photo, name, prediction in zip(photos, names, found, strict=True):
        (alone,) = visadapt.predict(model, photo, name, top=5)
        assert alone.labels == prediction.labels
        assert alone.probabilities == pytest.approx(prediction.probabilities, abs=1e-6)


def test_auto_asks_the_decider(photos: list[Path]) -> None:
    model = second(flowers())
    with pytest.raises(VisadaptError, match="task='auto' needs a decider"):
        visadapt.predict(model, photos, "auto")
    dark, bright = torch.randn(8, 3, 32, 32) - 2, torch.randn(8, 3, 32, 32) + 2
    visadapt.fit_decider(model, {"flowers": [dark], "birds": [bright]})
    found = visadapt.predict(model, torch.cat([dark[:2], bright[:2]]), "auto", batch_size=3)
    assert [p.task for p in found] == ["flowers", "flowers", "birds", "birds"]
    assert [p.task for p in visadapt.predict(model, Image.new("RGB", (32, 32), "white"), "auto")] == ["birds"]
    tasks(model)["birds"].inputs = ImageInputs(24)
    with pytest.raises(VisadaptError, match="prepare their inputs alike, but 'flowers', 'birds' differ"):
        visadapt.predict(model, photos, "auto")


def test_the_kind_of_output_is_the_files(photos: list[Path]) -> None:
    model = flowers()
    notes = tasks(model)["flowers"].notes
    batch = visadapt.preprocess(model, "flowers")(photos)
    with torch.no_grad(), visadapt.using(model, "flowers"):
        logits = model(batch)
    notes["problem_type"] = "multi_label_classification"
    for row, prediction in zip(logits, visadapt.predict(model, photos, "flowers", threshold=0.4), strict=True):
        assert set(prediction.labels) == {LABELS[i] for i in (row.sigmoid() >= 0.4).nonzero().flatten()}
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
    assert all(len(p.labels) == 2 for p in visadapt.predict(model, photos, "flowers", top=2, threshold=1.0))
    notes["problem_type"] = "regression"
    found = visadapt.predict(model, photos, "flowers")
    torch.testing.assert_close(torch.tensor([p.values for p in found]), logits)
    assert found[0].labels == LABELS
    assert found[0].probabilities == ()
    assert found[0].label is None
    notes["problem_type"] = "poetry"
    with pytest.raises(VisadaptError, match=r"problem_type must be one of single_label_classification, .*'poetry'"):
        visadapt.predict(model, photos, "flowers")


def test_the_users_modes_come_back(photos: list[Path]) -> None:
    model = flowers().train()
    model.layer1.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert visadapt.predict(model, photos, "flowers") == visadapt.predict(flowers(), photos, "flowers")
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(VisadaptError):
        visadapt.predict(model, "missing.png", "flowers")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_threads_leave_the_modes_as_they_were(photos: list[Path]) -> None:
    model, expected = flowers().train(), visadapt.predict(flowers(), photos, "flowers")
    before = [module.training for module in model.modules()]
    wrong: list[object] = []

    def work() -> None:
        answers = [visadapt.predict(model, photos, "flowers") for _ in range(5)]
        wrong.extend(answer for answer in answers if answer != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [module.training for module in model.modules()] == before


def test_a_backbone_of_the_callers_own(saved: Path, tmp_path: Path, photos: list[Path]) -> None:
    own = visadapt.eject(flowers())
    model = visadapt.open(saved, backbone=own)
    assert model is own
    assert visadapt.predict(model, photos, "flowers") == visadapt.predict(flowers(), photos, "flowers")
    assert visadapt.open(saved, backbone="timm/resnet18", build=SMALL) is not own
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    other = visadapt.inject(net, visadapt.LoRA(r=1), task="a", head="frozen", where="op")
    file = visadapt.save(other, "a", tmp_path / "a.visadapt")
    with pytest.raises(VisadaptError, match=r"a.visadapt does not record its backbone: give it with backbone="):
        visadapt.open(file)
    with pytest.raises(VisadaptError, match="build= must be left out beside a module"):
        visadapt.open(file, backbone=visadapt.eject(other), build={"weights": None})


def test_a_file_may_not_choose_what_is_not_allowed(saved: Path, tmp_path: Path) -> None:
    model = visadapt.open(saved)
    evil = {"name": "timm/resnet18", "build": {"checkpoint_path": "/etc/passwd"}}
    file = visadapt.save(model, "flowers", tmp_path / "evil.visadapt", notes={"backbone": evil})
    with pytest.raises(VisadaptError, match=r"must not choose checkpoint_path=.*by backbone= and build="):
        visadapt.open(file)


def test_what_is_wrong_with_a_call_is_said(saved: Path, photos: list[Path]) -> None:
    model = visadapt.open(saved)
    for wrong, message in {
        "task 'flower'; did you mean 'flowers'": lambda: visadapt.predict(model, photos, "flower"),
        "one task per input, got 2 for 5 inputs": lambda: visadapt.predict(model, photos, ["flowers"] * 2),
        "at least one image or text, got none": lambda: visadapt.predict(model, [], "flowers"),
        "top must be a positive integer, got 0": lambda: visadapt.predict(model, photos, "flowers", top=0),
        "batch_size must be a positive integer": lambda: visadapt.predict(model, photos, "flowers", batch_size=0),
        "threshold must be a probability": lambda: visadapt.predict(model, photos, "flowers", threshold=2),
        "a float batch as the model takes it, got torch.uint8": lambda: visadapt.predict(
            model, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "flowers"
        ),
        "an image must be a path or an image of Pillow, got int": lambda: visadapt.predict(model, [3], "flowers"),
        "NaN or infinite logits for 1 of 2": lambda: visadapt.predict(
            model, torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan)]), "flowers"
        ),
        "source must be a task file": lambda: visadapt.open([]),
        "no file .*flower.visadapt; did you mean 'flowers.visadapt'": lambda: visadapt.open(
            saved.with_name("flower.visadapt")
        ),
    }.items():
        with pytest.raises(VisadaptError, match=wrong):
            message()


def test_texts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = visadapt.inject("bundled/minilm", m=2, task="mood", labels=["bad", "good"], num_classes=2).eval()
    # the tokenizer is the backbone's, which the caller named
    assert visadapt.preprocess(model, "mood").inputs == TextInputs("bundled/minilm")
    found = visadapt.predict(model, ["a fine day", "rain, and a very long walk home"], "mood", top=2)
    assert [set(p.labels) for p in found] == [{"bad", "good"}] * 2
    file = visadapt.save(model, "mood", tmp_path / "mood.visadapt")
    again = visadapt.open(file)
    (single,) = visadapt.predict(again, "a fine day", top=2)
    assert single.probabilities == pytest.approx(found[0].probabilities, abs=1e-6)
    with pytest.raises(VisadaptError, match="inputs of this task must be texts, got Image"):
        visadapt.predict(again, Image.new("RGB", (8, 8)), "mood")


def test_a_tokenizer_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = visadapt.data.hub.resolve("bundled/minilm")
    visadapt.inject(model, m=2, task="mood", num_classes=2)
    with pytest.raises(VisadaptError, match="task 'mood' does not record its tokenizer: name the backbone"):
        visadapt.preprocess(model, "mood")
    assert visadapt.preprocess(model, "mood", backbone="bundled/minilm")("fine")["input_ids"].shape[0] == 1


def test_build_options_that_json_cannot_hold_are_left_out(tmp_path: Path) -> None:
    model = visadapt.inject("timm/resnet18", m=2, task="a", num_classes=2, **SMALL, act_layer=nn.ReLU)
    notes = visadapt.task_file.read(visadapt.save(model, "a", tmp_path / "a.visadapt")).description["notes"]
    assert json.dumps(notes) == "{}"
