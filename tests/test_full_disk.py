"""A writer that cannot write says so in one error, and leaves the files as they were."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EXPECTED = {
    "full_disk": "VisadaptError: cannot .*File too large",
    "no_descriptors": "VisadaptError: .*Too many open files",
    "interrupted": "KeyboardInterrupt: ",
    "read_only": "VisadaptError: cannot .*(Permission denied|Operation not permitted|Read-only file system)",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What `tests.full_disk` printed."""
    if not Path("/sys/kernel").is_dir():
        pytest.skip("no folder that nobody can write to on this system")
    folder = tmp_path_factory.mktemp("disk")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.full_disk", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("condition", EXPECTED)
def test_what_cannot_be_written_is_an_error_and_nothing_is_half_written(
    outcomes: dict[str, dict[str, str]], condition: str
) -> None:
    assert len(outcomes) == 10
    for name, found in outcomes.items():
        said = found[condition]
        assert re.fullmatch(EXPECTED[condition] + r"( \(os error \d+\))?(: '.*')?", said), f"{name}: {said}"
