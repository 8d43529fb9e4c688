"""Kill processes that write files, look at what they left, and let the same work go on.

Each kind of work runs in a child that is forked from this process, so that nothing is imported again. It is killed with
SIGKILL, either at a random moment or at one of its steps in the file system, and the same work is started again in the
same folder. It must end with the numbers and files of a run that was not killed; files that were whole before it was
killed must be whole afterwards; and partial files must be gone once they are old and the file is written again.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kills_work import WORK, Work
from visadapt.table import Table

_OLD = 7200.0

_PARTIAL = re.compile(r".*\.partial(/|$)")

STEPS = frozenset({"open", "os.rename", "os.remove", "os.chmod", "os.truncate", "os.mkdir"})
"""Audit events of the interpreter at which a process may be killed."""


@dataclass
class Killed:
    """What killing one kind of work did.

    Attributes:
        kills: number of processes that were killed.
        before: kills before anything was written.
        lost: descriptions of what was lost, or ended with other numbers.
        partial: number of partial files that were left, all of which were swept.
        seconds: of a run that is not killed.
    """

    kills: int = 0
    before: int = 0
    lost: list[str] | None = None
    partial: int = 0
    seconds: float = 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """Figures for the table."""
        return str(self.kills), str(self.before), str(len(self.lost or ())), str(self.partial)


def child(call: Callable[[], Any], answer: Path, when: float | None = None) -> str | None:
    """Run a function in a forked process.

    Args:
        call: what to run; what it returns is written to ``answer`` as JSON.
        answer: file, outside of the folder that is worked in.
        when: seconds after which the process is killed; None: never.

    Returns:
        The answer; None if the process was killed.

    Raises:
        RuntimeError: the process failed by itself.
    """
    answer.unlink(missing_ok=True)
    process = os.fork()
    if not process:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:  # progress and warnings of work that is killed
                os.dup2(nowhere.fileno(), 1)
                if "VISADAPT_KILLS_LOUD" not in os.environ:
                    os.dup2(nowhere.fileno(), 2)
            answer.write_text(json.dumps(call()), encoding="utf-8")
            code = 0
        finally:
            os._exit(code)
    if when is not None:
        time.sleep(when)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the process ended with status {os.waitstatus_to_exitcode(status)}")
    return answer.read_text(encoding="utf-8")


def at_step(call: Callable[[], Any], folder: Path, last: int | None = None) -> Callable[[], Any]:
    """Count the steps of a function in the file system, and kill the process before one of them.

    Args:
        call: the function.
        folder: steps on files of this folder count.
        last: number of the step that is not reached; None to run to the end, and return how many there were.
    """

    def counted() -> Any:
        steps, place = 0, str(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            if event in STEPS and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(place):
                steps += 1
                if steps == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        answer = call()
        return steps if last is None else answer

    return counted


def files(folder: Path) -> list[str]:
    """Names of the files of a folder, partial ones left out."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not _PARTIAL.match(name))


def partial_files(folder: Path) -> list[Path]:
    """Partial files and folders in a folder."""
    return [path for path in folder.rglob("*") if _PARTIAL.match(path.name)]


def measure(work: Work, kills: int, rng: random.Random, place: Path, steps: bool) -> Killed:
    """Kill one kind of work a number of times.

    Args:
        work: the work.
        kills: how often.
        rng: draws when.
        place: an empty folder.
        steps: whether to kill at steps in the file system only, instead of at random moments and at steps in turn.
    """
    found, answer = Killed(lost=[]), place / "answer"
    assert found.lost is not None

    def fresh(name: str) -> Path:
        folder = place / name
        folder.mkdir()
        child(lambda: work.begin(folder), answer)
        return folder

    whole = fresh("whole")
    count = int(child(at_step(lambda: work.run(whole), whole), answer) or 0)
    left = files(whole)
    times = []
    for name in ("again", "once more"):
        again = fresh(name)
        begun = time.perf_counter()
        expected = child(lambda f=again: work.run(f), answer)  # type: ignore[misc]
        times.append(time.perf_counter() - begun)
    found.seconds = min(times)
    for number in range(3 * kills):  # a run that is over by then is not killed
        if found.kills == kills:
            break
        folder = fresh(f"{number}")
        before = files(folder)
        if steps or number % 2:
            # in each part of them, the last ones too
            part = number % kills
            step = 1 + (part * count) // kills + rng.randrange(max(1, count // kills))
            said = child(at_step(lambda f=folder, s=step: work.run(f), folder, step), answer)  # type: ignore[misc]
            moment = f"step {step} of {count}"
        else:
            delay = rng.random() * found.seconds
            said = child(lambda f=folder: work.run(f), answer, delay)  # type: ignore[misc]
            moment = f"{delay:.2f} s"
        found.kills += said is None
        found.before += said is None and files(folder) == before and not partial_files(folder)
        try:
            child(lambda f=folder: work.look(f), answer)  # type: ignore[misc]
            told = child(lambda f=folder: work.run(f), answer)  # type: ignore[misc]
        except RuntimeError as error:
            told = str(error)
        if (told, files(folder)) != (expected, left):
            found.lost.append(f"{work.name}, killed at {moment}: {told}, files {files(folder)}")
        old = partial_files(folder)
        found.partial += len(old)
        for path in old:
            for inner in (path, *path.rglob("*")):
                os.utime(inner, (time.time() - _OLD,) * 2)
        if old:
            for name in files(folder):
                (folder / name).unlink()
            child(lambda f=folder: [work.begin(f), work.run(f)], answer)  # type: ignore[misc]
            found.lost += [f"{work.name}, killed at {moment}: {path} was not swept" for path in partial_files(folder)]
    return found


def run(kills: int, seed: int, place: Path, steps: bool = False) -> dict[str, Killed]:
    """Kill all kinds of work.

    Args:
        kills: how often each.
        seed: of the moments.
        place: an empty folder.
        steps: see `measure`.
    """
    found = {}
    for work in WORK:
        folder = place / work.name.replace(" ", "-")
        folder.mkdir()
        found[work.name] = measure(work, kills, random.Random(f"{seed} {work.name}"), folder, steps)
    return found


def table(found: dict[str, Killed]) -> Table:
    """One row per kind of work."""
    headings = ("work", "kills", "before a write", "lost", "partial files, swept")
    return Table(headings, [(name, *each.row) for name, each in found.items()])
