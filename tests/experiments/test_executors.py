"""Every engine gives the same results, and so does an experiment that was killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.experiments.conftest import make_contender, small
from visadapt import VisadaptError
from visadapt.experiments import Compare, Result, Sequence, read_results, run_experiment
from visadapt.experiments.run import Lookup, TrainingRun
from visadapt.experiments.train import Workspace
from visadapt.methods import Bottleneck, Full

ROOT = Path(__file__).parents[2]
COMPARE = Compare((small(),), (make_contender(Bottleneck(4), "bottleneck m=4"),), (0, 1, 2, 3))
CHAIN = Sequence(
    (small("digits"), small("mnist"), small("fashion-mnist")), (make_contender(),), make_contender(Full(), "full")
)


def figures(results: list[Result]) -> list[tuple[object, ...]]:
    """Return what must not depend on the engine."""
    return [(r.key, r.contender, r.seed, r.split, r.score, r.facts) for r in results]


def quietly(experiment: object, folder: Path, engine: str = "local", processes: int = 1) -> list[Result]:
    return run_experiment(experiment, folder, engine, processes, say=lambda _: None)  # type: ignore[arg-type]


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="no engine 'rey'; did you mean 'ray'"):
        quietly(COMPARE, tmp_path, "rey")


def test_a_missing_device_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="device 'cuda:99' cannot be used here"):
        run_experiment(COMPARE, tmp_path, device="cuda:99", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Fatal(TrainingRun):
    """Kill the process at the first attempt, as an operating system that is short of memory does."""

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        marker = workspace.folder.parent / "died"
        if self.seed == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().results(missing, workspace)


class Deadly(Compare):
    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        return [Fatal(**vars(run)) for run in super().runs(lookup)]


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_the_same_call_resumes(tmp_path: Path) -> None:
    deadly = Deadly(COMPARE.problems, COMPARE.contenders, (0, 1))
    with pytest.raises(VisadaptError, match=r"one of the 2 processes was killed.* the same command resumes"):
        quietly(deadly, tmp_path / "results", processes=2)
    assert len(quietly(deadly, tmp_path / "results", processes=2)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_ray_cluster_gives_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, cluster = quietly(COMPARE, tmp_path / "here"), quietly(COMPARE, tmp_path / "ray", "ray", 2)
    assert figures(cluster) == figures(here)
    assert not ray.is_initialized(), "the cluster that was started here is shut down"


def started(experiment: str, folder: Path, processes: int) -> subprocess.Popen[str]:
    code = (
        "from tests.experiments.test_executors import *\n"
        "if __name__ == '__main__':\n"
        f"    run_experiment({experiment}, {str(folder)!r}, 'local', {processes}, say=lambda s: print(s, flush=True))\n"
    )
    script = folder.parent / f"{folder.name}.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("COMPARE", 2), ("CHAIN", 1)])
def test_a_killed_experiment_resumes_and_ends_with_the_same_results(tmp_path: Path, name: str, processes: int) -> None:
    experiment = globals()[name]
    whole = quietly(experiment, tmp_path / "whole")
    killed = started(name, tmp_path / "killed", processes)
    assert killed.stdout is not None
    killed.stdout.readline()
    children = [int(p) for p in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    assert len(children) >= processes - 1
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children), "the pool's processes have exited"
    finished = read_results(tmp_path / "killed")
    assert 1 <= len(finished) < len(whole)
    lines: list[str] = []
    resumed = run_experiment(experiment, tmp_path / "killed", "local", processes, say=lines.append)
    assert len(lines) == len(whole) - len(finished)
    assert figures(resumed) == figures(whole)
