"""The report of the evidence, complete and interrupted after any number of results."""

from __future__ import annotations

import pytest

from tests.report.fake_evidence import fake_evidence
from visadapt import VisadaptError
from visadapt.experiments import Result
from visadapt.report import Look, Report, build, page
from visadapt.report.claims import STATEMENTS
from visadapt.report.clipping import Window, window

ONLY = ("bars", "sequence", "crossmodal", "more_methods")
"""All stages but those that need to know the layers of a network, or take long to draw."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return fake_evidence(tmp_path_factory.mktemp("evidence"), only=ONLY, seeds=2)


@pytest.fixture(scope="module")
def report(results: list[Result]) -> Report:
    return build(results)


def test_all_stages_have_their_sections(report: Report) -> None:
    assert [section.name for section in report.sections] == [
        "compare", "sequence", "crossmodal", "decathlon"
    ]  # fmt: skip
    assert report.advice is not None
    assert [row[0] for row in report.advice.rows] == ["minilm", "resnet50"]
    assert report.budgets is not None
    assert {row[0] for row in report.budgets.rows} == {"minilm", "resnet50"}
    (decathlon,) = (section for section in report.sections if section.name == "decathlon")
    assert "over cifar10, elpv96, fashion-mnist, gtsrb64, mnist and omniglot64" in decathlon.finding


def test_every_claim_has_a_verdict_in_text_and_images(report: Report) -> None:
    tested = [(claim.text, claim.modality) for claim in report.claims]
    assert tested == [(each.text, modality) for each in STATEMENTS for modality in each.modalities]
    untested = {claim.text for claim in report.claims if claim.measured == "no results"}
    assert len(untested) == 9
    assert all(claim.verdict == "cannot be decided" for claim in report.claims if claim.text in untested)
    assert all((claim.training_runs == 0) == (claim.text in untested) for claim in report.claims)


def test_the_comparison_is_not_mixed_with_other_backbones(report: Report) -> None:
    near = [claim for claim in report.claims if claim.text == STATEMENTS[0].text]
    assert [claim.training_runs for claim in near] == [2 * 2 * 9, 2 * 2 * 6]


def test_a_nonlinear_bottleneck_is_one_with_a_named_activation(report: Report) -> None:
    (claim,) = (claim for claim in report.claims if claim.text.startswith("A nonlinear"))
    assert claim.measured.startswith("bottleneck m=8 activation=gelu: ")
    assert claim.training_runs == 2 * 2 * 6


def test_the_page_is_small_and_names_what_to_take_first(report: Report) -> None:
    text = page(report)
    assert len(text) < 2_000_000
    first = text.index("<h2>")
    assert text[first:].startswith("<h2>Which method should I take?</h2><p class='finding'>On minilm, take ")


@pytest.mark.parametrize("count", [1, 30, 77, 150, 333, 600])
def test_an_interrupted_run_has_a_report(results: list[Result], count: int) -> None:
    part = results[:count]
    if not any(result.split == "test" for result in part):
        with pytest.raises(VisadaptError, match="too few for a report"):
            build(part)
        return
    report = build(part)
    for section in report.sections:
        assert section.finding
        for drawing in section.drawings:
            drawing.draw(Look())
    assert len({claim.text for claim in report.claims}) >= 10


def test_before_any_final_run_there_is_a_comparison_of_nothing(results: list[Result]) -> None:
    tests = [result for result in results if result.experiment == "compare" and result.split == "test"]
    report = build(tests[:2])
    assert (report.advice, report.budgets, report.lead) == (None, None, ())
    assert {claim.verdict for claim in report.claims} == {"cannot be decided"}


def test_an_axis_is_clipped_where_one_value_would_press_all_others_together() -> None:
    assert window([-50.0, -1.0, -0.5, 0.0, 0.5, 1.0]) == Window(low=-1.0)
    assert window([0.0, 0.1, 0.2, 0.3, 40.0]) == Window(high=0.3)
    assert window([0.0, 0.0, 0.0, 0.0, 1.5]) == Window()
    assert window([-50.0, 0.0, 1.0]) == Window(), "three values say nothing"
    clipped = window([-50.0, -1.0, -0.5, 0.0, 0.5, 1.0])
    assert (clipped.clip(-50), clipped.clip(3), -50.0 in clipped, 3.0 in clipped) == (-1.0, 3, False, True)
    assert clipped.label("points") == "points\n(clipped: the rest as numbers)"
    assert Window().label("points") == "points"
