"""From a folder or a table to labels: train, evaluate and predict on the data that people have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli.test_cli import SEES, reads, records, run, tiny_bert
from visadapt.task_file import read

pytest.importorskip("typer")
pytest.importorskip("transformers")

QUICK = ("--m", 2, "--epochs", 1)
IMAGES = (*SEES, "--size", 32, *QUICK)


def note(task: Path, name: str) -> object:
    return read(task).description["notes"].get(name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders without a split, one damaged file, and a table of the same files."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = []
    for label, name in enumerate(("dark", "light")):
        (root / "flat" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(100 * label, 100 * label + 100, (30 + i, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / "flat" / name / f"{i}.jpg")
            rows.append(f"flat/{name}/{i}.jpg,{name},{label + i / 100},{'bright;day' if label else 'night'}")
    (root / "flat" / "dark" / "12.jpg").write_bytes(b"")
    (root / "images.csv").write_text("\n".join(["file,label,value,tags", *rows]), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    tiny_bert(root / "bert")
    return root


@pytest.mark.filterwarnings("default:.*skipping 1 of")
def test_a_flat_folder_is_split_and_said(photos: Path, tmp_path: Path) -> None:
    task = tmp_path / "flat.visadapt"
    trained = run("train", photos / "flat", *IMAGES, "--out", task)
    assert "flat: 5 of 25 images held out for test" in trained.stderr
    assert re.search(r"flat \((train|validation|test)\): skipping 1 of ", trained.stderr)
    assert "12.jpg is not a readable image" in trained.stderr
    assert "quick setting: 1 epoch, head first" in trained.stderr
    assert f"next: visadapt predict new-images/ --task {task}" in trained.stderr
    # as many as the folder has, but for the damaged one
    (whole,) = records(run("evaluate", task, photos / "flat", "--json"))
    assert (whole["split"], whole["samples"]) == ("all", 24)
    (held,) = records(run("evaluate", task, photos / "flat", "--split", "test", "--json"))
    assert held["samples"] in (4, 5)
    refused = run("train", photos / "flat", *IMAGES, "--damaged", 0, "--out", tmp_path / "x.visadapt")
    assert refused.exit_code == 0, "a single damaged image is never too many"


def test_images_that_do_not_fit_into_memory_give_the_same(photos: Path, tmp_path: Path) -> None:
    held, lazy = tmp_path / "held.visadapt", tmp_path / "lazy.visadapt"
    table = ("train", photos / "images.csv", *IMAGES, "--task", "t")
    run(*table, "--out", held)
    run(*table, "--memory", 0, "--out", lazy)
    for memory in (1, 0):
        (found,) = records(run("evaluate", held, photos / "images.csv", "--memory", memory, "--json"))
        assert found["samples"] == 24
        assert found == {**records(run("evaluate", held, photos / "images.csv", "--json"))[0]}
    assert note(held, "inputs") == note(lazy, "inputs")


def test_tables_of_images_with_real_values_and_several_labels(photos: Path, tmp_path: Path) -> None:
    values, tags = tmp_path / "worth.visadapt", tmp_path / "tags.visadapt"
    trained = run("train", photos / "images.csv", *IMAGES, "--label", "value", "--regression", "--out", values)
    assert "pearson on 4 test samples" in trained.stderr
    assert (note(values, "problem_type"), read(values).description["labels"]) == ("regression", None)
    (found,) = records(run("evaluate", values, photos / "images.csv", "--json"))
    assert set(found) >= {"pearson", "loss"}
    run("train", photos / "images.csv", *IMAGES, "--label", "tags", "--multi-label", ";", "--out", tags)
    assert note(tags, "problem_type") == "multi_label_classification"
    assert read(tags).description["labels"] == ["bright", "day", "night"]
    (found,) = records(run("evaluate", tags, photos / "images.csv", "--json"))
    assert (found["samples"], set(found) >= {"micro_f1", "loss"}) == (24, True)
    answers = records(run("predict", photos / "flat" / "light" / "1.jpg", "--task", values, "--task", tags))
    assert [answer["task"] for answer in answers] == ["worth", "tags"]
    score = answers[0]["top"][0]["score"]
    assert score != 1.0, "a real value, not a probability"


def test_predict_reads_the_table_that_train_read(bert: Path, tmp_path: Path) -> None:
    texts = [f"what a {('fine', 'sad', 'long')[i % 3]} day {i}" for i in range(30)]
    rows = [f"{i};{('good', 'bad', 'so-so')[i % 3]};{text}" for i, text in enumerate(texts)]
    file, task = tmp_path / "reviews.csv", tmp_path / "reviews.visadapt"
    file.write_bytes("\n".join(["id;mood;review", *rows, "30;good;café"]).encode("latin-1"))
    form = ("--text", "review", "--label", "mood", "--delimiter", ";", "--encoding", "latin-1")
    run("train", file, *form, *reads(bert), "--length", 8, *QUICK, "--out", task)
    assert note(task, "table") == {
        "text": ["review"], "label": "mood", "delimiter": ";", "encoding": "latin-1"}  # fmt: skip
    answers = records(run("predict", file, "--task", task, *reads(bert)))
    assert [answer["input"] for answer in answers] == [*texts, "café"]
    (found,) = records(run("evaluate", task, file, *reads(bert), "--json"))
    assert found["samples"] == 31
    (tmp_path / "other.csv").write_text("words,mood\nwhat a day,good\n", encoding="utf-8")
    refused = run("predict", tmp_path / "other.csv", "--task", task, *reads(bert), code=1)
    assert "no column 'review'" in refused.stderr or "expected" in refused.stderr
    chosen = run("predict", tmp_path / "other.csv", "--task", task, *reads(bert), "--text", "words",
                 "--delimiter", ",")  # fmt: skip
    assert [answer["input"] for answer in records(chosen)] == ["what a day"]


def test_predict_reads_the_images_of_the_table_that_train_read(photos: Path, tmp_path: Path) -> None:
    rows = (photos / "images.csv").read_text(encoding="utf-8").replace("file,label", "photo,kind").split("\n")
    wanted = [row.split(",")[0] for row in rows[1:]]
    table, task = tmp_path / "images.csv", tmp_path / "kinds.visadapt"
    table.write_text("\n".join(rows).replace(",", "|"), encoding="utf-8")
    form = ("--image", "photo", "--label", "kind", "--delimiter", "|", "--root", photos)
    run("train", table, *form, *IMAGES, "--seed", 3, "--out", task)
    answers = records(run("predict", table, "--task", task, "--root", photos))
    assert [answer["input"] for answer in answers] == [str(photos / name) for name in wanted], "not the labels"
    beside = records(run("predict", photos / "images.csv", "--task", task, "--image", "file", "--delimiter", ","))
    assert beside == answers
    refused = run("predict", table, "--task", task, code=1)
    assert f"24 of 24 images do not exist, such as {tmp_path / wanted[0]}" in refused.stderr
    assert "--root is the folder that the names start from" in refused.stderr
    # the samples that train held out, without being told its seed
    held, same, other = (
        records(run("evaluate", task, table, "--root", photos, "--split", "test", *seed, "--json"))[0]
        for seed in ((), ("--seed", 3), ("--seed", 0))
    )
    assert held == same != other


def test_predict_reads_what_the_datasets_library_stores(bert: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict(
        {"text": [f"note {i}" for i in range(20)], "label": ["ab"[i % 2] for i in range(20)]}
    )
    rows.to_json(tmp_path / "a.jsonl")
    rows.train_test_split(0.25, seed=0).save_to_disk(tmp_path / "stored")
    task = tmp_path / "a.visadapt"
    run("train", tmp_path / "a.jsonl", *reads(bert), "--length", 8, *QUICK, "--out", task)
    for data in ("a.jsonl", "stored"):
        answers = records(run("predict", tmp_path / data, "--task", task, *reads(bert)))
        assert {answer["input"] for answer in answers} == {f"note {i}" for i in range(20)}
    refused = run("predict", tmp_path / "a.jsonl", "--task", task, *reads(bert), "--delimiter", ";", code=1)
    assert "--delimiter has no effect" in refused.stderr


def test_inputs_of_the_other_kind_are_refused_by_name(photos: Path, bert: Path, tmp_path: Path) -> None:
    texts, images = tmp_path / "texts.visadapt", tmp_path / "images.visadapt"
    (tmp_path / "t.csv").write_text("text\tlabel\n" + "".join(f"note {i}\t{'ab'[i % 2]}\n" for i in range(20)))
    # a tab is hard to type in a shell
    run("train", tmp_path / "t.csv", "--delimiter", r"\t", *reads(bert), "--length", 8, *QUICK, "--out", texts)
    by_name = [option.replace("false", "False") for option in IMAGES[:4]]
    run("train", photos / "images.csv", *by_name, *IMAGES[4:], "--out", images)
    assert read(images).description["notes"]["backbone"]["build"]["pretrained"] is False
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    for data, task, words in (
        (photos / "flat" / "light" / "1.jpg", texts, "1.jpg is an image, and the task takes texts"),
        (tmp_path / "a.xlsx", texts, "a.xlsx is not a text file, and the task takes texts"),
        (tmp_path, texts, "an input must be a text file, got the folder"),
        ("-", images, "- is standard input, from which only texts are read, and the task takes images"),
        ("/dev/null", images, "place must be an image or a folder, got the device /dev/null"),
    ):
        assert words in run("predict", data, "--task", task, *(reads(bert) if task == texts else ()), code=1).stderr


def test_messages_name_the_options_of_the_command_line(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("words,label\n" + "one,a\ntwo,b\n" * 10, encoding="utf-8")
    result = run("train", file, *reads(bert), *QUICK, "--out", tmp_path / "o.visadapt", code=1)
    assert "choose the text column with --text (two for pairs)" in result.stderr
    file.write_bytes(b"text,label\ncaf\xe9,a\n")
    result = run("train", file, *reads(bert), *QUICK, "--out", tmp_path / "o.visadapt", code=1)
    assert "byte 0xe9 at offset 14, in row 2" in result.stderr
    assert "--encoding" in result.stderr


def test_texts_with_real_values_and_several_labels(bert: Path, tmp_path: Path) -> None:
    rows = [f"text {i},{i / 10},{('a|b', 'b', '')[i % 3]}" for i in range(30)]
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["text,score,tags", *rows]), encoding="utf-8")
    common = (*reads(bert), "--length", 8, *QUICK)
    values, tags = tmp_path / "worth.visadapt", tmp_path / "tags.visadapt"
    run("train", file, *common, "--label", "score", "--regression", "--out", values)
    run("train", file, *common, "--label", "tags", "--multi-label", "|", "--out", tags)
    assert read(tags).description["labels"] == ["a", "b"]
    for task in (values, tags):
        (found,) = records(run("evaluate", task, file, *reads(bert), "--json"))
        assert (found["samples"], torch.tensor(found["loss"]).isfinite().item()) == (30, True)


def test_notes_of_a_table_are_checked(bert: Path, tmp_path: Path) -> None:
    import visadapt
    from visadapt.data.hub import resolve

    model = resolve(f"hf/{bert / 'bert'}").eval()
    visadapt.inject(model, m=2, task="t", num_classes=2, labels=["a", "b"])
    task = visadapt.save(model, "t", tmp_path / "t.visadapt", notes={"table": {"opener": "rm"}})
    (tmp_path / "a.csv").write_text("text,label\nx,a\n", encoding="utf-8")
    result = run("evaluate", task, tmp_path / "a.csv", *reads(bert), code=1)
    assert "the note 'table' of the task must hold options of a table" in result.stderr
    assert json.dumps({"opener": "rm"})[1:5] not in result.stdout


@pytest.mark.filterwarnings("default:.*skipping 1 of")
def test_images_are_augmented_by_timm(photos: Path, tmp_path: Path) -> None:
    change = ("--random-crop", 0.4, "--rand-augment", "rand-m5", "--mixup", 0.2, "--cutmix", 1)
    first, second = tmp_path / "a.visadapt", tmp_path / "b.visadapt"
    for out in (first, second):
        run("train", photos / "flat", *IMAGES, *change, "--task", "t", "--out", out)
    one, two = (load_file(out) for out in (first, second))
    assert all(torch.equal(one[key], two[key]) for key in one), "the same seed gives the same file"
    table = ("train", photos / "images.csv", *IMAGES, "--label", "value", "--regression", "--mixup", 0.2)
    assert "need one class per image" in run(*table, "--out", tmp_path / "c.visadapt", code=1).stderr
