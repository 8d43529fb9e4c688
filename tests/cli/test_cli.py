"""The command line: what it gives for small real data, and one line and an exit code for everything that is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import visadapt
from tests.versions import LOADS_PROGRAMS
from visadapt import cli
from visadapt.data import load_images, load_text, minilm_path
from visadapt.data.hub import resolve
from visadapt.data.inputs import from_description
from visadapt.experiments import Modality, problem
from visadapt.task_file import read
from visadapt.training import predict

pytest.importorskip("typer")
from typer.testing import CliRunner, Result

from visadapt.cli.app import EXAMPLES, app
from visadapt.cli.experiment import EXPERIMENTS, _planned
from visadapt.cli.terminated import terminable

CHANNELS = [8, 16, 24, 32]
SEES = ["--backbone", "timm/resnet18", "--build", "pretrained=false", "--build", f"channels={CHANNELS}"]
NAMES = ("zero", "one", "two")


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


def reads(place: Path) -> tuple[str, str]:
    """The tiny BERT by hand: a file must not choose a local folder."""
    return ("--backbone", f"hf/{place / 'bert'}")


def records(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.split("\n") if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits, a table of tweets, a tiny BERT, and a task of each."""
    folder = tmp_path_factory.mktemp("cli")
    mnist = load_images("mnist")
    for split, part, count in (("train", mnist.train, 12), ("test", mnist.test, 4)):
        for label, name in enumerate(NAMES):
            for i in (part.labels == label).nonzero().flatten()[:count].tolist():
                file = folder / "photos" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(part.images[i].permute(1, 2, 0).numpy()).save(file)
    tweets = load_text("tweets").train
    rows = [f"{tweets.texts[i]}\t{('bad', 'so-so', 'good')[tweets.labels[i]]}" for i in range(60)]
    (folder / "tweets.tsv").write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    (folder / "plain.tsv").write_text("\n".join(rows), encoding="utf-8")
    tiny_bert(folder / "bert")
    run("train", folder / "photos", *SEES, "--size", 32, "--m", 4, "--epochs", 2, "--out", folder / "photos.visadapt")
    run("train", folder / "tweets.tsv", "--backbone", f"hf/{folder / 'bert'}", "--length", 16, "--m", 2, "--epochs", 1,
        "--out", folder / "tweets.visadapt")  # fmt: skip
    return folder


def tiny_bert(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_path()))
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve("timm/resnet18", pretrained=False, channels=CHANNELS).eval()


def test_train_writes_a_task_that_a_library_user_can_load(place: Path) -> None:
    model = network()
    assert visadapt.load(model, place / "photos.visadapt") == "photos"
    task = visadapt.tasks(model)["photos"]
    assert task.labels == ("one", "two", "zero")
    assert str(task.placements[0].method) == "Bottleneck(m=4)"
    assert task.notes["backbone"] == {"name": "timm/resnet18", "build": {"pretrained": False, "channels": CHANNELS}}
    inputs = from_description(task.notes["inputs"])
    assert inputs.size == 32


def test_train_says_what_it_did(place: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "again.visadapt", tmp_path / "log.jsonl"
    options = ("--method", "Parallel", "--option", "rank=2", "--norms", "frozen", "--where", "layer1", "--augment")
    result = run("train", place / "photos", *SEES, "--size", 32, *options, "--epochs", 1, "--log", log, "--out", out)
    # the linear probe that the head started as is epoch 0; the best of the two is kept
    assert "; head first: linear probe, loss " in result.stdout
    assert re.search(r"^ +[01] \*", result.stdout, re.MULTILINE)
    assert "accuracy on 12 test samples: " in result.stderr
    assert f"{out}: 3 classes, " in result.stderr
    (entry,) = read(out).description["placements"]
    assert (entry["method"], entry["options"]["rank"]) == ("Parallel", 2)
    assert all(site.startswith("conv3x3:layer1") for site in entry["sites"])
    assert json.loads(log.read_text())["epoch"] == 1


def test_train_is_the_same_for_the_same_seed_and_resumes(place: Path, tmp_path: Path) -> None:
    common = ("train", place / "photos", *SEES, "--size", 32, "--m", 4, "--epochs", 2, "--task", "photos")
    run(*common, "--checkpoint", tmp_path / "state", "--out", tmp_path / "a.visadapt")
    run(*common, "--checkpoint", tmp_path / "state", "--out", tmp_path / "b.visadapt")
    first, second, third = (
        load_file(file) for file in (place / "photos.visadapt", tmp_path / "a.visadapt", tmp_path / "b.visadapt")
    )
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], third[key]) for key in first)


def test_quick_is_chosen_by_the_size_of_the_data_said_and_noted(place: Path, tmp_path: Path) -> None:
    common = ("train", place / "photos", *SEES, "--size", 32, "--m", 4, "--where", "layer4", "--norms", "frozen")
    quick, plain, given = (tmp_path / f"{name}.visadapt" for name in ("quick", "plain", "given"))
    said = run(*common, "--lr", 3e-3, "--out", quick).stderr
    assert (
        "quick setting: at most 6 epochs, stop after 2 without a better score, head first, up to "
        "layer3.1.act2 computed once (options override it; --no-quick for the recipe as it is)\n"
    ) in said
    notes = read(quick).description["notes"]
    assert notes["training"] == {
        "recipe": "houlsby", "epochs": 6, "lr": 3e-3, "patience": 2, "quick": {"epochs": 6, "patience": 2}
    }  # fmt: skip
    assert "quick setting" not in run(*common, "--no-quick", "--epochs", 1, "--no-head-first", "--out", plain).stderr
    assert read(plain).description["notes"]["training"] == {"recipe": "houlsby", "epochs": 1, "head_first": False}
    assert "setting: 1 epochs, head first" not in run(*common, "--recipe", "fine-tuning", "--epochs", 1,
                                                     "--patience", 1, "--out", given).stderr  # fmt: skip
    assert read(given).description["notes"]["training"] == {"recipe": "fine-tuning", "epochs": 1, "patience": 1}


def test_the_scores_are_noted_and_shown(place: Path) -> None:
    task = place / "photos.visadapt"
    noted = read(task).description["notes"]["metrics"]
    assert (noted["metric"], noted["seed"]) == ("accuracy", 0)
    assert noted["test"]["samples"] == 12
    (found,) = records(run("evaluate", task, place / "photos", "--split", "test", "--json"))
    assert found["accuracy"] == noted["test"]["score"]
    words = f"{noted['test']['score']:.4f} on 12 samples"
    shown = run("summary", task).stdout
    assert re.search(rf"scored +accuracy \(validation\) .*, accuracy \(test\) {words}, seed 0", shown)
    model = network()
    visadapt.load(model, task)
    assert words in visadapt.summary(model)["photos"].metrics
    assert words in str(visadapt.summary(model))


def test_the_cached_prefix_trains_the_same(place: Path, tmp_path: Path) -> None:
    common = ("train", place / "photos", *SEES, "--size", 32, "--method", "Linear", "--norms", "frozen", "--task", "t")
    options = ("--epochs", 2, "--patience", 2)
    with_cache = run(*common, *options, "--out", tmp_path / "a.visadapt")
    without = run(*common, *options, "--no-quick", "--out", tmp_path / "b.visadapt")
    assert "computed once" in with_cache.stderr
    assert "computed once" not in without.stderr
    first, second = (read(tmp_path / f"{name}.visadapt").description["notes"]["metrics"] for name in "ab")
    assert first == second


def test_columns_by_number(place: Path, tmp_path: Path) -> None:
    options = ("--text", 0, "--label", 1, "--no-header", "--backbone", f"hf/{place / 'bert'}", "--length", 8)
    run("train", place / "plain.tsv", *options, "--m", 2, "--epochs", 1, "--out", tmp_path / "t.visadapt")
    assert read(tmp_path / "t.visadapt").description["labels"] == ["bad", "good", "so-so"]


def test_evaluate(place: Path) -> None:
    result = run("evaluate", place / "photos.visadapt", place / "photos", "--metric", "accuracy", "--json")
    (found,) = records(result)
    assert (found["task"], found["split"], found["samples"]) == ("photos", "test", 12)
    model = network()
    visadapt.load(model, place / "photos.visadapt")
    images = load_images(place / "photos", size=32).test
    inputs = from_description(visadapt.tasks(model)["photos"].notes["inputs"])
    right = predict(model, "photos", images, prepare=inputs).argmax(-1) == images.labels
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    shown = run(
        "evaluate", place / "tweets.visadapt", place / "tweets.tsv", "--split", "validation", *reads(place)
    ).stdout
    assert "6 validation samples" in shown
    assert "loss" in shown


def test_evaluate_measures_all_of_a_single_file_by_the_tasks_classes(place: Path, tmp_path: Path) -> None:
    task = (place / "tweets.visadapt", *reads(place))
    (found,) = records(run("evaluate", *task, place / "tweets.tsv", "--json"))
    assert (found["split"], found["samples"]) == ("all", 60)
    (held,) = records(run("evaluate", *task, place / "tweets.tsv", "--split", "test", "--json"))
    assert (held["split"], held["samples"]) == ("test", 12)
    rows = [row for row in (place / "plain.tsv").read_text(encoding="utf-8").split("\n") if row.endswith("\tgood")][:3]
    (tmp_path / "few.tsv").write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    (few,) = records(run("evaluate", *task, tmp_path / "few.tsv", "--metric", "accuracy", "--json"))
    (tmp_path / "few.txt").write_text("\n".join(row.partition("\t")[0] for row in rows), encoding="utf-8")
    answers = records(run("predict", tmp_path / "few.txt", "--task", *task))
    assert few["samples"] == len(answers) == 3
    assert few["accuracy"] == pytest.approx(sum(a["top"][0]["label"] == "good" for a in answers) / 3)
    assert "all 3 samples" in run("evaluate", *task, tmp_path / "few.tsv").stdout


def test_evaluate_refuses_what_the_task_does_not_take(place: Path, tmp_path: Path) -> None:
    task, file = (place / "tweets.visadapt", *reads(place)), tmp_path / "pairs.tsv"
    file.write_text("sentence1\tsentence2\tlabel\none\ttwo\tgood\n", encoding="utf-8")
    assert "takes single texts, but" in run("evaluate", *task, file, code=1).stderr
    run("evaluate", *task, file, "--text", "sentence2")
    file.write_text("text\tlabel\none\tgod\n", encoding="utf-8")
    assert "label 'god', which is not a class; did you mean 'good'" in run("evaluate", *task, file, code=1).stderr


def test_evaluate_finds_classes_by_name(place: Path, tmp_path: Path) -> None:
    """A folder that lacks a class numbers the others differently; the task's labels count."""
    for split in ("train", "test"):
        for name in ("two", "zero"):
            shutil.copytree(place / "photos" / split / name, tmp_path / split / name)
    (part,) = records(run("evaluate", place / "photos.visadapt", tmp_path, "--metric", "accuracy", "--json"))
    answers = records(run("predict", tmp_path / "test", "--task", place / "photos.visadapt"))
    right = [answer["top"][0]["label"] == Path(answer["input"]).parent.name for answer in answers]
    assert part["samples"] == len(right) == 8
    assert part["accuracy"] == pytest.approx(sum(right) / 8)


def test_evaluate_knows_classes_that_a_folders_train_has_not(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "photos" / "train" / "two", tmp_path / "train" / "two")
    shutil.copytree(place / "photos" / "test", tmp_path / "test")
    found = records(run("evaluate", place / "photos.visadapt", tmp_path, "--json"))
    assert found == [{**found[0], **records(run("evaluate", place / "photos.visadapt", place / "photos", "--json"))[0],
                      "data": str(tmp_path)}]  # fmt: skip
    (tmp_path / "test" / "two").rename(tmp_path / "test" / "too")
    refused = run("evaluate", place / "photos.visadapt", tmp_path, code=1)
    assert "class 'too' is not a class of the task; did you mean 'two'" in refused.stderr


def test_what_is_no_number_is_no_answer(place: Path, tmp_path: Path) -> None:
    model = network()
    visadapt.load(model, place / "photos.visadapt")
    with torch.no_grad():
        next(iter(visadapt.parameters(model, "photos"))).fill_(float("nan"))
    broken = visadapt.save(model, "photos", tmp_path / "nan.visadapt")
    for command in (("evaluate", broken, place / "photos"), ("predict", place / "photos" / "test", "--task", broken)):
        result = run(*command, code=1)
        assert "task 'photos' gives NaN or infinite logits for 12 of 12" in result.stderr
        assert result.stdout == ""


def test_train_wants_labels_and_at_least_two_of_them(place: Path, tmp_path: Path) -> None:
    reads = ("--backbone", f"hf/{place / 'bert'}", "--out", tmp_path / "o.visadapt")
    file = tmp_path / "odd.tsv"
    file.write_text("text\tlabel\n" + "a\tgood\n" * 20 + "b\t\n", encoding="utf-8")
    assert "row 22: the label is empty" in run("train", file, *reads, code=1).stderr
    file.write_text("text\tlabel\n" + "a\tgood\n" * 20, encoding="utf-8")
    assert "odd.tsv must have at least two classes, got only 'good'" in run("train", file, *reads, code=1).stderr
    for split in ("train", "test"):
        shutil.copytree(place / "photos" / split / "one", tmp_path / "photos" / split / "one")
    result = run("train", tmp_path / "photos", *SEES, "--size", 16, "--out", tmp_path / "o.visadapt", code=1)
    assert "must have at least two classes, got only 'one' in its training samples" in result.stderr
    assert not (tmp_path / "o.visadapt").exists()


def test_predict_pictures_by_many_tasks(place: Path, tmp_path: Path) -> None:
    run("train", place / "photos", *SEES, "--size", 16, "--method", "Linear", "--norms", "frozen", "--epochs", 1,
        "--out", tmp_path / "other.visadapt")  # fmt: skip
    files = sorted((place / "photos" / "test").rglob("*.png"))
    tasks = ("--task", place / "photos.visadapt", "--task", tmp_path / "other.visadapt")
    # a batch smaller than the folder, so that there are several
    answers = records(run("predict", place / "photos" / "test", *tasks, "--top", 2, "--batch-size", 5))
    assert [(a["input"], a["task"]) for a in answers] == [(str(f), t) for f in files for t in ("photos", "other")]
    model = network()
    visadapt.load(model, place / "photos.visadapt")
    inputs = from_description(visadapt.tasks(model)["photos"].notes["inputs"])
    scores = predict(model, "photos", inputs.read(files), prepare=inputs).softmax(-1)
    for answer, expected in zip(answers[::2], scores, strict=True):
        best = expected.topk(2)
        assert [t["label"] for t in answer["top"]] == [("one", "two", "zero")[i] for i in best.indices.tolist()]
        assert [t["score"] for t in answer["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_predict_reports_what_it_cannot_read_and_goes_on(place: Path, tmp_path: Path) -> None:
    whole = sorted((place / "photos" / "test").rglob("*.png"))[:4]
    folder = tmp_path / "mixed"
    folder.mkdir()
    names = [os.fsencode(name) for name in ("a.png", "b.png", "c\x1b[31m.png")] + [b"d\xff.png"]
    for name, file in zip(names, whole, strict=True):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(file.read_bytes())
    (folder / "b.png").write_bytes(whole[1].read_bytes()[:60])
    answers = {}
    for form in ("jsonl", "table"):
        out = tmp_path / f"answers.{form}"
        result = run("predict", folder, "--task", place / "photos.visadapt", "--format", form, "--out", out, code=1)
        assert "b.png is not a readable image" in result.stderr
        assert "d\\udcff.png is not valid text" in result.stderr
        assert "\x1b" not in result.stderr + out.read_text()
        answers[form] = out.read_text().splitlines()
    inputs = [json.loads(line)["input"] for line in answers["jsonl"]]
    assert [os.fsencode(each).rpartition(b"/")[2] for each in inputs] == [name for name in names if name != b"b.png"]
    assert len(answers["table"]) == 5


def test_predict_texts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines.txt").write_text("what a day\n\nwhat a mess\n", encoding="utf-8")
    task = ("--task", place / "tweets.visadapt", *reads(place))
    answers = records(run("predict", tmp_path / "lines.txt", *task))
    assert [answer["input"] for answer in answers] == ["what a day", "what a mess"]
    assert all(answer["top"][0]["label"] in ("bad", "so-so", "good") for answer in answers)
    # what is no line's end to train is none here
    (tmp_path / "odd.txt").write_bytes("\ufeffwhat a\u2028day\r\nwhat a\fmess\n".encode())
    odd = records(run("predict", tmp_path / "odd.txt", *task))
    assert [answer["input"] for answer in odd] == ["what a\u2028day", "what a\fmess"]
    piped = CliRunner().invoke(app, ["predict", "-", *map(str, task)], input="what a day\nwhat a mess\n")
    assert records(piped) == answers
    run("predict", tmp_path / "lines.txt", *task, "--format", "table", "--out", tmp_path / "out.txt")
    table = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert table[0].split() == ["input", "task", "label", "score"]
    assert table[2].startswith("what a day")


def test_sites_and_summary(place: Path) -> None:
    listed = run("sites", "timm/resnet18", "--where", "layer2").stdout
    assert "conv3x3  layer2.0.conv1" in listed
    assert "layer1" not in listed
    cost = run("summary", "timm/resnet18", "--method", "Parallel").stdout
    assert "Parallel()" in cost
    assert "1,220,608" in cost  # 10.9 % of a ResNet-18, as the paper has it
    told = run("summary", place / "tweets.visadapt").stdout
    assert "bad, good, so-so" in told
    assert '"length": 16' in told
    assert "Bottleneck(m=2)" in told


def test_merge_gives_weights_that_the_plain_network_takes(place: Path, tmp_path: Path) -> None:
    run("train", place / "photos", *SEES, "--size", 32, "--method", "Parallel", "--epochs", 1,
        "--out", tmp_path / "linear.visadapt")  # fmt: skip
    run("merge", tmp_path / "linear.visadapt", "--out", tmp_path / "plain.safetensors")
    plain = resolve("timm/resnet18", pretrained=False, channels=CHANNELS, num_classes=3).eval()
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    model = network()
    visadapt.load(model, tmp_path / "linear.visadapt")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    refused = run("merge", place / "photos.visadapt", "--out", tmp_path / "no.safetensors", code=1)
    assert "cannot be merged" in refused.stderr
    assert not (tmp_path / "no.safetensors").exists()


@LOADS_PROGRAMS
def test_export_to_a_program(place: Path, tmp_path: Path) -> None:
    run("export", place / "photos.visadapt", "--out", tmp_path / "photos.pt2")
    extra = {"labels": ""}
    program = torch.export.load(tmp_path / "photos.pt2", extra_files=extra)
    assert json.loads(extra["labels"]) == ["one", "two", "zero"]
    model = network()
    visadapt.load(model, place / "photos.visadapt")
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
def test_export_to_onnx(place: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("export", place / "tweets.visadapt", "--out", tmp_path / "tweets.onnx", *reads(place))
    session = onnxruntime.InferenceSession(tmp_path / "tweets.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == ["bad", "good", "so-so"]
    model = resolve(f"hf/{place / 'bert'}").eval()
    visadapt.load(model, place / "tweets.visadapt")
    ids = torch.randint(5, 1000, (3, 11))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = session.run(["logits"], {name: tokens[name].numpy() for name in (i.name for i in session.get_inputs())})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**tokens).logits, rtol=1e-3, atol=1e-4)


def test_experiment_and_report(place: Path, tmp_path: Path) -> None:
    sizes = ("--seeds", 1, "--epochs", 1, "--train", 16, "--length", 8, "--results", tmp_path / "results")
    who = ("--contender", "linear probe", "--contender", "full fine-tuning")
    command = ("experiment", "compare", "--problem", f"hf/{place / 'bert'}:{place / 'tweets.tsv'}", *who, *sizes)
    compared = run(*command)
    assert "results in" in compared.stderr
    assert (
        "full fine-tuning: per problem 3 to 7 training runs to choose by, then 1; epochs 1; batches of 16"
        in compared.stderr
    )
    assert "the reference" in compared.stdout
    files = sorted((tmp_path / "results" / "compare").glob("*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    run(*command)
    assert [file.stat().st_mtime_ns for file in files] == times, "a finished run was repeated"
    run("report", tmp_path / "results", "--out", tmp_path / "page")
    assert "full fine-tuning" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "page.html").is_file()


WRONG = {
    # what is asked: arguments, with {place} and {tmp}; exit code; what standard error says
    "no such command": ("trian", 2, "No such command 'trian'"),
    "no data": ("train", 2, ""),
    "no such option": ("sites timm/resnet18 --wher block", 2, "No such option"),
    "epochs that are no number": ("train d --backbone b --out o --epochs three", 2, "Invalid value for '--epochs'"),
    "no out": ("merge {place}/photos.visadapt", 2, "'--out'"),
    "place of a backbone misspelt": ("sites tim/resnet18", 1, "no backbone 'tim/resnet18'; did you mean 'timm'?"),
    "backbone misspelt": ("sites timm/resnet81", 1, "did you mean"),
    "no such site": ("sites timm/resnet18 --where layr2", 1, "where='layr2' matches no site"),
    "build without value": ("sites timm/resnet18 --build pretrained", 1, "--build must be KEY=VALUE, got 'pretrained'"),
    "method misspelt": (
        "summary timm/resnet18 --method Botleneck",
        1,
        "no method 'Botleneck'; did you mean 'Bottleneck'",
    ),
    "option misspelt": (
        "summary timm/resnet18 --method Parallel --option rnk=2",
        1,
        "no option 'rnk'; did you mean 'rank'",
    ),
    "width of a method without": ("summary timm/resnet18 --method DAN --m 8", 1, "DAN has no option 'm'"),
    "width that is none": ("summary timm/resnet18 --m wide", 1, "m must be a positive integer"),
    "task file that is none": (
        "summary {place}/photo.visadapt",
        1,
        "no file {place}/photo.visadapt; did you mean 'photos.visadapt'",
    ),
    "task file of another kind": ("evaluate {place}/tweets.tsv x", 1, "tweets.tsv is not a whole task file"),
    "no such data": (
        "train mnst SEES --out {tmp}/o.visadapt",
        1,
        "no image data set or folder 'mnst'; did you mean 'mnist'",
    ),
    "folder that is not laid out": ("train {place} SEES --out {tmp}/o.visadapt", 1, "did you mean {place}/photos?"),
    "texts for a backbone that sees": (
        "train {place}/tweets.tsv SEES --out {tmp}/o.visadapt",
        1,
        "has the columns 'text', 'label': choose the column of file names with --image",
    ),
    "length of pictures": (
        "train {place}/photos SEES --length 8 --out {tmp}/o.visadapt",
        1,
        "takes images: give a size instead of a length",
    ),
    "no such column": (
        "train {place}/tweets.tsv READS --label lable --out {tmp}/o.visadapt",
        1,
        "tweets.tsv; did you mean 'label'",
    ),
    "rate of zero": (
        "train {place}/photos SEES --lr 0 --out {tmp}/o.visadapt",
        1,
        "lr must be a positive number, got 0",
    ),
    "recipe misspelt": (
        "train {place}/photos SEES --recipe houlsbi --out {tmp}/o.visadapt",
        1,
        "no recipe 'houlsbi'; did you mean 'houlsby'",
    ),
    "metric misspelt": (
        "evaluate {place}/photos.visadapt {place}/photos --metric acuracy",
        1,
        "no metric 'acuracy'; did you mean 'accuracy'",
    ),
    "split misspelt": ("evaluate {place}/photos.visadapt {place}/photos --split dev", 1, "no split 'dev'"),
    "another backbone": (
        "evaluate {place}/photos.visadapt {place}/photos --backbone hf/{place}/bert",
        1,
        "was trained on another backbone",
    ),
    "task file that is there": (
        "train {place}/photos SEES --out {place}/photos.visadapt",
        1,
        "already exists: use --force to overwrite it",
    ),
    "folder that is not there": (
        "merge {place}/photos.visadapt --out {tmp}/nowhere/m.safetensors",
        1,
        "no folder {tmp}/nowhere",
    ),
    "out that is a folder": (
        "merge {place}/photos.visadapt --out {tmp}",
        1,
        "--out must be a file, got the folder {tmp}",
    ),
    "export of another kind": (
        "export {place}/photos.visadapt --out {tmp}/m.tflite",
        1,
        "--out must end in .onnx or .pt2",
    ),
    "picture that is none": (
        "predict {place}/photos.visadapt --task {place}/photos.visadapt",
        1,
        "photos.visadapt is not a readable image",
    ),
    "table of no pictures": (
        "predict {place}/tweets.tsv --task {place}/photos.visadapt",
        1,
        "tweets.tsv has the columns 'text', 'label': choose the column of file names with --image",
    ),
    "no picture": ("predict {place}/none.png --task {place}/photos.visadapt", 1, "no image or folder"),
    "no text file": ("predict {place}/none.txt --task {place}/tweets.visadapt READS", 1, "none.txt as a text file"),
    "task twice": (
        "predict x --task {place}/photos.visadapt --task {place}/photos.visadapt",
        1,
        "a task 'photos' already",
    ),
    "format misspelt": (
        "predict x --task {place}/photos.visadapt --format json",
        1,
        "no format 'json'; did you mean 'jsonl'",
    ),
    "experiment misspelt": (
        "experiment tradeof --problem a/b:c --results {tmp}/r",
        1,
        "no experiment 'tradeof'; did you mean 'tradeoff'",
    ),
    "problem without data": (
        "experiment compare --problem resnet50 --results {tmp}/r",
        1,
        "--problem must be BACKBONE:DATA",
    ),
    "engine misspelt": (
        "experiment compare --problem bundled/minilm:tweets --engine rai --results {tmp}/r",
        1,
        "no engine 'rai'",
    ),
    "the same problem twice": (
        "experiment compare --problem bundled/minilm:tweets --problem bundled/minilm:tweets --results {tmp}/r",
        1,
        "--problem must be different each time, got 'minilm tweets' twice: results are known by this name",
    ),
    "a contender by two names": (
        "experiment compare --problem a/b:c --contender lora --contender LoRA --results {tmp}/r",
        1,
        "--contender must be different each time, got 'lora' twice",
    ),
    "a file for results": (
        "experiment compare --problem bundled/minilm:tweets --results {place}/tweets.tsv",
        1,
        "--results must be a folder, got the file {place}/tweets.tsv",
    ),
    "contender of crossmodal": (
        "experiment crossmodal --problem bundled/minilm:tweets --contender lora --results {tmp}/r",
        1,
        "--contender of crossmodal must be a bottleneck such as 'bottleneck m=8', got 'lora'",
    ),
    "contender of an experiment that has its own": (
        "experiment tradeoff --problem bundled/minilm:tweets --contender full --results {tmp}/r",
        1,
        "--contender of tradeoff must be left out, since it has its own, got 'full'",
    ),
    "two contenders for one": (
        "experiment transfer --problem bundled/minilm:tweets --contender lora --contender full --results {tmp}/r",
        1,
        "--contender of transfer must be one, with adapters, got 'lora', 'full'",
    ),
    "nothing to put at parts of the depth": (
        "experiment modality --problem bundled/minilm:tweets --contender linear --results {tmp}/r",
        1,
        "modality varies the depth of adapters: give a --contender that has some",
    ),
    "nothing to take out": (
        "experiment ablation --problem hf/{place}/bert:{place}/tweets.tsv --contender full --results {tmp}/r",
        1,
        "the contender must have adapters in the layers of hf/{place}/bert, such as 'bottleneck m=8'; "
        "got 'full fine-tuning'",
    ),
    "device that is not there": (
        "experiment compare --problem hf/{place}/bert:{place}/tweets.tsv --device cuda:99 --results {tmp}/r",
        1,
        "device 'cuda:99' cannot be used here",
    ),
    "augmented texts": (
        "train {place}/tweets.tsv READS --augment --out {tmp}/o.visadapt",
        1,
        "--augment has no effect: hf/{place}/bert takes texts",
    ),
    "metric of real values": (
        "train {place}/tweets.tsv READS --metric pearson --out {tmp}/o.visadapt",
        1,
        "labels must be real-valued for pearson, got one class per sample",
    ),
    "no results": ("report {tmp}/nothing --out {tmp}/page", 1, "no folder or file of results"),
    "results of nothing": ("report {tmp} --out {tmp}/page", 1, "too few for a report"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_line(place: Path, tmp_path: Path, case: str) -> None:
    words, code, expected = WRONG[case]
    known = {"place": place, "tmp": tmp_path}
    parts, reads = [], ["--backbone", f"hf/{place / 'bert'}"]
    for word in words.split():
        parts += {"SEES": SEES, "READS": reads}.get(word, [word.format(**known)])
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    result = run(*parts, code=code)
    assert expected.format(**known) in result.stderr
    if code == 1:
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == [], "something was written"
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


def test_force_replaces(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    out.write_text("old")
    command = ("predict", place / "photos" / "test" / "one", "--task", place / "photos.visadapt", "--out", out)
    assert "--force" in run(*command, code=1).stderr
    assert out.read_text() == "old"
    run(*command, "--force")
    assert len(out.read_text().splitlines()) == 4


def test_texts_and_pictures_are_not_asked_at_once(place: Path, tmp_path: Path) -> None:
    tasks = ("--task", place / "photos.visadapt", "--task", place / "tweets.visadapt")
    result = run("predict", "x", *tasks, *SEES, code=1)
    assert "was trained on another backbone" in result.stderr


def test_a_task_that_remembers_nothing_needs_the_backbone(place: Path, tmp_path: Path) -> None:
    model = resolve(f"hf/{place / 'bert'}").eval()
    visadapt.inject(model, m=2, task="mute", num_classes=2)
    mute = visadapt.save(model, "mute", tmp_path / "mute.visadapt")
    (tmp_path / "lines.txt").write_text("hello\n")
    result = run("predict", tmp_path / "lines.txt", "--task", mute, code=1)
    assert "does not record its backbone: give it with --backbone" in result.stderr
    (answer,) = records(run("predict", tmp_path / "lines.txt", "--task", mute, "--backbone", f"hf/{place / 'bert'}"))
    assert answer["top"][0]["label"] in ("0", "1")


@pytest.mark.parametrize("backbone", ["timm/resnet18", {"name": 5}, {"name": "timm/resnet18", "build": "small"}])
def test_notes_of_a_library_user_are_no_backbone(place: Path, tmp_path: Path, backbone: object) -> None:
    model = network()
    visadapt.load(model, place / "photos.visadapt")
    noted = visadapt.save(model, "photos", tmp_path / "noted.visadapt", notes={"backbone": backbone})
    result = run("predict", "x.png", "--task", noted, code=1)
    assert "does not record its backbone: give it with --backbone" in result.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_one_line_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, said: str
) -> None:
    """Where a file is on its way to the disk."""
    sync = os.fsync

    def signalled(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        signal.raise_signal(number)

    monkeypatch.setattr(os, "fsync", signalled)
    # a program that is started in the background of a shell ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    out = tmp_path / "out"
    try:
        result = run("predict", place / "photos" / "test" / "one", "--task", place / "photos.visadapt", "--out", out,
                     code=code)  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stderr.splitlines()[-1] == f"{said}: no file was left half-written"
    assert list(tmp_path.iterdir()) == []
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) is signal.SIG_DFL


def test_a_worker_that_was_forked_within_a_command_is_ended_by_the_signal() -> None:
    with terminable():
        with warnings.catch_warnings():
            # of forking beside other threads
            warnings.simplefilter("ignore", DeprecationWarning)
            worker = os.fork()
        if not worker:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(9)
    assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM


def test_modality_puts_the_first_adapter_at_parts_of_the_depth() -> None:
    problems = (problem("bundled/minilm", "tweets"),)
    names = ["linear probe", "top layers n=1", "lora r=4", "bottleneck m=8"]
    planned = _planned(EXPERIMENTS["modality"], problems, names, (0,), 3)
    assert isinstance(planned, Modality)
    assert [one.name for one in planned.contenders] == names
    assert planned.deep is planned.contenders[2]


def test_help_has_examples_that_name_real_options() -> None:
    for command, examples in EXAMPLES.items():
        shown = run(command.__name__, "--help").stdout
        for example in examples:
            assert example in shown
            options = [word for word in example.split() if word.startswith("--")]
            assert all(option in shown.partition("Examples:")[0] for option in options)


def test_version_and_help_without_a_command() -> None:
    assert run("--version").stdout.strip() == visadapt.__version__
    assert all(command.__name__ in run("--help").stdout for command in EXAMPLES)


def test_without_typer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("visadapt.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit, match=r"pip install 'visadapt\[cli\]'"):
        cli.main()
