"""The decathlon score, against the published scores of nine methods."""

import pytest

from visadapt import VisadaptError
from visadapt.experiments.decathlon import FINE_TUNED, score

PUBLISHED = {
    "scratch": (1625, "59.87 57.10 75.73 91.20 37.77 96.55 56.30 88.74 96.63 43.27"),
    "feature extractor": (544, "59.67 23.31 63.11 80.33 45.37 68.16 73.69 58.79 43.54 26.80"),
    "fine-tune": (2500, "59.87 60.34 82.12 92.82 55.53 97.53 81.41 87.69 96.55 51.20"),
    "BN adaptation": (1363, "59.87 43.05 78.62 92.07 51.60 95.82 74.14 84.83 94.10 43.51"),
    "series 2017": (2118, "59.67 56.68 81.20 93.88 50.85 97.05 66.24 89.62 96.13 47.45"),
    "series 2018": (3159, "60.32 61.87 81.22 93.88 57.13 99.27 81.67 89.62 96.57 50.12"),
    "parallel 2018": (3412, "60.32 64.21 81.92 94.73 58.83 99.38 84.68 89.21 96.54 50.94"),
    "parallel SVD": (3398, "60.32 66.04 81.86 94.23 57.82 99.24 85.74 89.25 96.62 52.50"),
    "DAN": (2851, "57.74 64.12 80.07 91.30 56.54 98.46 86.05 89.67 96.77 49.38"),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_scores(method) -> None:
    expected, row = PUBLISHED[method]
    assert score([float(a) for a in row.split()]) == pytest.approx(expected, abs=3)


def test_known_scores() -> None:
    assert score(FINE_TUNED) == pytest.approx(2500)
    assert score(dict.fromkeys(FINE_TUNED, 100.0)) == pytest.approx(10_000)
    assert score(dict.fromkeys(FINE_TUNED, 0.0)) == 0
    assert score([90.0, 50.0], [80.0, 75.0]) == pytest.approx(1000 * 0.75**2)
    assert score({"b": 50.0, "a": 90.0}, {"a": 80.0, "b": 75.0}) == score([90.0, 50.0], [80.0, 75.0])


@pytest.mark.parametrize(
    ("accuracies", "baselines", "message"),
    [
        ([90.0], [80.0, 75.0], "must be one accuracy per task, got 1 for 2 tasks"),
        ({"flower": 90.0}, {"flowers": 80.0}, "did you mean 'flower'"),
        ({"a": 90.0, "b": 1.0}, {"a": 80.0}, "no baseline for task 'b'"),
        ([101.0], [80.0], r"the accuracy of task '0' must be in \[0, 100\] %, got 101.0"),
        ([90.0], [100.0], r"the baseline of task '0' must be in \[0, 100\) %, got 100.0"),
    ],
)
def test_wrong_tasks_and_percentages_are_refused(accuracies, baselines, message) -> None:
    with pytest.raises(VisadaptError, match=message):
        score(accuracies, baselines)
