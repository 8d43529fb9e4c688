"""The benchmarks, and running one of them in a process of its own within a time."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.figures import TOOK
from visadapt.experiments.machine import computes_in_bf16

ROOT = Path(__file__).parents[1]

FEW = 2
"""Repeats of the first round of a run with a budget."""


@dataclass(frozen=True)
class Job:
    """One benchmark with its options.

    Attributes:
        module: its module in this package; ``python -m benchmarks.<module>`` runs it alone.
        options: of its command line, apart from the device and the number of repeats.
        repeats: a full measurement has so many.
        on_gpu: options that are others on a GPU, where small batches measure the time to start kernels.
    """

    module: str
    options: dict[str, str] = field(default_factory=dict)
    repeats: int = 5
    on_gpu: dict[str, str] = field(default_factory=dict)

    def arguments(self, device: str) -> list[str]:
        """Return the arguments of its command line, apart from the device and the number of repeats."""
        options = {**self.options, **(self.on_gpu if device.startswith("cuda") else {})}
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def name(self, device: str) -> str:
        """Return its name in the CSV file."""
        return " ".join((self.module, *self.arguments(device)))


JOBS = (
    Job("train_step", {"size": "96"}, 5, {"batch": "128"}),
    Job("train_step", {"size": "224"}, 3, {"batch": "64"}),
    Job("encoder_step", {}, 3, {"batch": "32"}),
    Job("inference", {}, 7, {"batch": "64"}),
    Job("precision", {}, 1),
    Job("mixed_batches", {"tasks": "8"}, 11),
    Job("mixed_batches", {"tasks": "64"}, 5),
    Job("prefix", {}, 3, {"images": "512", "batch": "64"}),
    Job("bookkeeping", {}, 15),
    Job("serving", {}, 3),
)

PEERS = {"train_step": "peft", "encoder_step": "adapters", "serving": "peft"}
"""Libraries that a benchmark compares with; where one is not installed, its figures are left out."""


def missing_peers(modules: list[str], given: bool) -> list[str]:
    """Return a line per library to compare with that is not installed.

    Args:
        modules: names of the benchmarks that are to run.
        given: whether adapters' own interpreter was named.
    """
    return [
        f"{module}: figures beside {peer} are left out ({peer} is not installed)"
        for module, peer in PEERS.items()
        if module in modules and not (peer == "adapters" and given) and importlib.util.find_spec(peer) is None
    ]


def device_name(device: str) -> str:
    """Return the name of a device, for results and file names."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def facts(device: str) -> dict[str, str]:
    """Return what figures depend on: device, versions, threads and the machine."""
    parts = [
        processor(),
        f"{os.cpu_count()} cores",
        *([] if computes_in_bf16(device) else ["no instructions for bfloat16"]),
    ]
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
        parts += [f"{memory / 1e9:.0f} GB on the GPU", f"CUDA {torch.version.cuda}"]
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": ", ".join(parts),
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass
class Run:
    """How a benchmark ended.

    Attributes:
        error: the last line that it said, if it failed; "" otherwise.
        stopped: whether it was stopped at its limit.
    """

    error: str = ""
    stopped: bool = False


def run(
    job: Job,
    device: str,
    repeats: int,
    record: Callable[[dict[str, str]], None],
    *,
    python: str,
    seconds: float | None = None,
    limit: float | None = None,
) -> Run:
    """Run one benchmark, and record each of its figures as soon as it is known.

    Args:
        job: the benchmark.
        device: to measure on.
        repeats: rounds of each measurement.
        record: receives each figure with the facts of this machine; that of the whole time comes last.
        python: interpreter.
        seconds: after which the benchmark repeats no more; None for no such time.
        limit: seconds after which it is stopped; None for no limit.
    """
    command = [python, "-m", f"benchmarks.{job.module}", *job.arguments(device)]
    command += ["--repeats", str(repeats), "--device", device]
    command += [] if seconds is None else ["--budget", f"{seconds:.1f}"]
    known, start, done = facts(device), time.monotonic(), Run()
    with tempfile.TemporaryFile("w+") as said:
        # a group of its own, so that what it starts is stopped with it
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, start_new_session=True
        )

        def stop() -> None:
            done.stopped = True
            _kill(process)

        timer = threading.Timer(threading.TIMEOUT_MAX if limit is None else limit, stop)
        timer.daemon = True
        with process:
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    record({"job": job.name(device), **{k: str(v) for k, v in json.loads(line).items()}, **known})
                process.wait()
            finally:
                timer.cancel()
                _kill(process)
        if done.stopped:
            return done
        if process.returncode:
            said.seek(0)
            lines = [line.strip() for line in said if line.strip()]
            return Run(lines[-1] if lines else f"exit status {process.returncode}")
    took = f"{time.monotonic() - start:.6g}"
    record({"job": job.name(device), "figure": TOOK, "setting": job.name(device), "value": took, "low": took,
            "high": took, "unit": "s", "repeats": str(repeats), **known})  # fmt: skip
    return done


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
