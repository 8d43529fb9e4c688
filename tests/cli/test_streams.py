"""A standard output that is closed, full, or read no further is an error of the command, in one line at most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from visadapt.experiments import Result, write_csv

pytest.importorskip("typer")

ROOT = Path(__file__).parents[2]

RESULT = Result("k0", "compare", "image", "net", "data", "who", 0, "test", "accuracy", 0.5, 1, 1, 9, 1.0, 9, 0.1, 1)

COMMANDS = """
visadapt() { "$PYTHON" -c 'from visadapt.cli import main; main()' "$@"; }
visadapt summary bundled/minilm --m 2 >&-; echo "closed: $?" >&2
visadapt summary bundled/minilm --m 2 > /dev/full; echo "full: $?" >&2
(visadapt summary bundled/minilm --m 2; echo "left: $?" >&2) | true
visadapt report results.csv --out page <&- >&-; echo "unused: $?" >&2
"""


@pytest.mark.slow
def test_an_output_that_cannot_be_written_to(tmp_path: Path) -> None:
    write_csv([RESULT], tmp_path / "results.csv")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", "-c", COMMANDS], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert lines == [
        "error: [Errno 9] Bad file descriptor",
        "closed: 1",
        "error: [Errno 28] No space left on device",
        "full: 1",
        "left: 1",
        "page.md",
        "page.html",
        "unused: 0",
    ]
