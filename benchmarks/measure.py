"""Measuring: interleaved repeats, their ratios, the bytes that autograd keeps, the peak of a process."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        figure: its name in ``benchmarks/goals.py``, or a name of its own if it has no goal.
        setting: what it was measured on.
        value: a ratio (the median over the repeats of one by the other), or a time.
        low: first quartile of the repeats.
        high: third quartile.
        unit: ``×``, ``ms`` or ``%``.
        repeats: how many.
    """

    figure: str
    setting: str
    value: float
    low: float
    high: float
    unit: str
    repeats: int


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> Times:
    """Seconds of each contender in each of ``repeats`` rounds, after one round to warm up.

    In a round each runs once: what else the machine does meanwhile slows all of them alike.
    """
    times: Times = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(figure: str, setting: str, times: Times, one: str, other: str) -> Row:
    """One contender's time over another's, round by round."""
    return spread(figure, setting, [a / b for a, b in zip(times[one], times[other], strict=True)], "×")


def milliseconds(figure: str, setting: str, seconds: Sequence[float]) -> Row:
    """A time."""
    return spread(figure, setting, [1e3 * s for s in seconds], "ms")


def spread(figure: str, setting: str, values: Sequence[float], unit: str) -> Row:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Row(figure, setting, statistics.median(values), quartiles[0], quartiles[2], unit, len(values))


def exact(figure: str, setting: str, value: float, unit: str = "×") -> Row:
    """A ratio that no repeat would change, or the share of a single run."""
    return Row(figure, setting, value, value, value, unit, 1)


def best(times: Times, names: Sequence[str]) -> str:
    """The contender with the least median."""
    return min(names, key=lambda name: statistics.median(times[name]))


def bytes_kept(model: nn.Module, loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, beside parameters, buffers and the batch."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(found.values())


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a run, backward included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def profile(figure: str, setting: str, run: Callable[[], object], most: int = 8) -> Iterator[Row]:
    """The share of a run's time that its dearest operators take, each without those that it calls."""
    with torch.profiler.profile() as profiler:
        run()
    events = sorted(profiler.key_averages(), key=_own_time, reverse=True)
    whole = sum(map(_own_time, events))
    for event in events[:most]:
        share = 100 * _own_time(event) / whole
        yield exact(f"profile: {figure}: {event.key}", setting, share, "%")


def _own_time(event: Any) -> float:
    return float(event.self_cpu_time_total + event.self_device_time_total)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """What ``run`` takes at its peak beyond what is held before it (``max_memory_allocated`` on a GPU, else RSS).

    On a CPU (under Linux) it is the peak of the whole process: see :func:`in_a_process_of_its_own`.
    """
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    # not getrusage, whose maximum a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def in_a_process_of_its_own(function: Callable[..., int], *arguments: object) -> int:
    """What a function of a module returns, called in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


class Step:
    """A training step: forward, backward and an AdamW step on the same batch."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        forward: Callable[[nn.Module], Tensor],
        labels: Tensor,
    ) -> None:
        self.model, self._forward, self._labels = model.train(), forward, labels
        self.trained = sum(p.numel() for p in parameters)
        self._optimiser = torch.optim.AdamW(parameters, lr=1e-5)

    def loss(self) -> Tensor:
        """The batch's loss."""
        return nn.functional.cross_entropy(self._forward(self.model), self._labels)

    def __call__(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        self._optimiser.step()


def given(description: str | None, **defaults: int) -> argparse.Namespace:
    """The command line of one benchmark: its numbers, ``--repeats``, ``--device``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    found = parser.parse_args()
    torch.manual_seed(0)
    return found


def tell(rows: Iterator[Row]) -> None:
    """Prints each row as a line of JSON as soon as it is known."""
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
