"""Ctrl-C ends the command with exit code 130 and no traceback, from the first import to the last line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from visadapt.cli.terminated import interruptible
from visadapt_command import end

pytest.importorskip("typer")

ROOT = Path(__file__).parents[2]

SLOW = pytest.mark.slow  # imports torch in a process of its own

PROGRAM = """
import atexit, os, runpy, signal, sys

entry, moment, *arguments = sys.argv[1:]
sys.argv = ["visadapt", *arguments]
signal.signal(signal.SIGINT, signal.default_int_handler)

def press(*_):
    os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(self, name, *_):
        if name == moment:
            press()
        if name == "visadapt.cli.app" and moment == "building":
            sys.modules["typer.main"].get_command = press

sys.meta_path.insert(0, Finder())
if moment == "exit":
    atexit.register(press)
if entry == "module":
    runpy.run_module("visadapt", run_name="__main__")
else:
    from visadapt_command import main
    main()
"""


@pytest.mark.parametrize(
    ("entry", "moment"),
    [
        ("script", "torch"),
        pytest.param("script", "visadapt.cli.train", marks=SLOW),
        pytest.param("script", "building", marks=SLOW),
        pytest.param("script", "exit", marks=SLOW),
        pytest.param("module", "visadapt.cli.app", marks=SLOW),
    ],
)
def test_at_any_moment_it_is_130_without_a_traceback(entry: str, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, entry, moment, "--version"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_running_command_may_clean_up() -> None:
    before = signal.signal(signal.SIGINT, end)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is end
    finally:
        signal.signal(signal.SIGINT, before)
