"""Many requests while tasks are loaded, replaced, removed and evicted: no answer is wrong, and none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import churn
from benchmarks.churn import DOCUMENTED, Known, Outcome, run


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.made(tmp_path_factory.mktemp("versions"))


@pytest.mark.parametrize(
    ("requests", "exact"),
    [(256, True), (256, False), pytest.param(2_048, True, marks=pytest.mark.slow)],
)
def test_every_answer_is_that_of_the_task_alone_or_a_documented_error(
    requests: int, exact: bool, known: Known, tmp_path: Path
) -> None:
    outcome = run(requests, exact, known, tmp_path)
    assert outcome.wrong == []
    # none is lost: each was answered, or refused for a documented reason
    assert set(outcome.counts) <= {"answered", *DOCUMENTED}
    assert outcome.lost == 0
    assert outcome.requests == requests
    assert outcome.counts["answered"] > requests / 3
    assert min(outcome.changes.values()) > 0
    assert outcome.metrics["evictions_total"] > 10
    assert outcome.metrics["loads_total"] > 10
    assert outcome.metrics["worker_restarts_total"] == 0
    if requests > 2_000:
        # flat: the second half of the requests adds less than 2 % to the process
        assert outcome.growth < 1.02, outcome.memory


def test_a_wrong_answer_is_found(known: Known, tmp_path: Path) -> None:
    other = {key: logits + 1e-6 for key, logits in known.answers.items()}
    outcome = run(128, True, Known(known.versions, other), tmp_path)
    assert len(outcome.wrong) >= outcome.counts["answered"] > 0
    assert not churn._same(torch.zeros(2), torch.zeros(3), exact=False)


def test_the_result_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{churn.BEGIN}old{churn.END}\nafter\n")
    outcome = Outcome(10, memory=[100] * 7 + [101], metrics={"loads_total": 3, "evictions_total": 2})
    outcome.counts.update(answered=8, broken_task=1)
    churn.write_page(page, str(outcome))
    said = page.read_text()
    assert "8 answered, 0 of them wrong; 1 refused" in said
    assert "1 lost" in said
    assert "old" not in said
    assert said.startswith("before")
    assert said.endswith("after\n")
