"""What a comparison says before it begins, and what follows from its results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.cli.test_cli import tiny_bert
from tests.experiments.conftest import small
from tests.report.test_advice import FULL, runs
from visadapt.cli.comparison import conclude, described
from visadapt.experiments import TextProblem


def test_what_was_decided_for_images_is_said() -> None:
    said = "\n".join(described(small(train=8, augment="shift"), (50, 90, 200)))
    assert "8 training, 50 validation and 60 test samples of 10 classes, scored by accuracy" in said
    assert "no samples are left to train" in said
    assert "one sample is 1.7 points" in said
    assert "are moved at random, none is mirrored (see --mirror)" in said
    assert "more epochs than usual" in said
    assert "imbalanced" not in said
    said = "\n".join(described(small(augment="shift and mirror", scored_by="macro_f1"), (5, 9, 20)))
    assert "half of them mirrored" in said
    assert not any(words in said for words in ("more epochs", "most frequent", "no samples"))


def test_what_was_decided_for_texts_is_said(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    rows = [f"{'a long text ' * (n % 2)}{n},{'rare' if n % 9 == 0 else 'usual'}" for n in range(90)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(rows))
    texts = TextProblem(f"hf/{tmp_path / 'bert'}", str(tmp_path / "texts.csv"), length=5)
    said = "\n".join(described(texts, ()))
    assert "18 of 90 rows held out for test" in said
    assert "the most frequent class is 89 % of the test samples; one sample is 5.6 points" in said
    assert "classes are imbalanced; --metric macro_f1 gives each class the same weight" in said
    assert "% of the training texts are cut to 5 tokens (see --length), or just fit" in said


def test_the_conclusion_is_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    conclude([*FULL, *runs("lora r=8", 2, 10, spread=0.1)])
    shown = capsys.readouterr()
    assert "On resnet50, take lora r=8" in shown.err
    assert "wide" not in shown.err
    assert "resnet50 over 3 problems: test accuracy in %, mean over 3 seeds" in shown.out
    conclude([*FULL, *runs("lora r=8", 0, 10, spread=9)])
    assert "the interval is wide: lora r=8 may be more than 1 point worse" in capsys.readouterr().err
    conclude([*(dataclasses.replace(r, facts={"kept": 0}) for r in FULL), *runs("lora r=8", 2, 10)])
    shown = capsys.readouterr()
    assert "On resnet50, nothing is decided" in shown.err
    assert "take" not in shown.err
    conclude([FULL[0], runs("lora r=8", 2, 10)[0]])
    assert "one seed: no interval" in capsys.readouterr().out
