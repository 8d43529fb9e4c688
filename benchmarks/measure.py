"""Measuring: interleaved repeats, their ratios, the bytes that autograd keeps, the peak memory of a process."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visadapt.backbone.stored_values import plain_tensors

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        figure: name, as in ``benchmarks/goals.py`` if it has a goal.
        setting: what it was measured on.
        value: median over the repeats, of a ratio or a time.
        low: first quartile over the repeats.
        high: third quartile over the repeats.
        unit: ``×``, ``ms``, ``s``, ``/s``, ``MB``, ``%``, or "" for a count.
        repeats: number of repeats.
    """

    figure: str
    setting: str
    value: float
    low: float
    high: float
    unit: str
    repeats: int


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> Times:
    """Time each contender in seconds in each of ``repeats`` rounds, after one warm-up round.

    In a round each contender runs once, so that other load on the machine affects all of them. Once the time of
    ``--budget`` is spent no round is begun, but there is always one.
    """
    times: Times = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() > _END:
            break
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
    """Return one contender's time divided by another's, per round."""
    return spread(figure, setting, [a / b for a, b in zip(times[one], times[other], strict=True)], "×")


def milliseconds(figure: str, setting: str, seconds: Sequence[float]) -> Row:
    """Return a time in milliseconds."""
    return spread(figure, setting, [1e3 * s for s in seconds], "ms")


def spread(figure: str, setting: str, values: Sequence[float], unit: str) -> Row:
    """Return the median and quartiles of values."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Row(figure, setting, statistics.median(values), quartiles[0], quartiles[2], unit, len(values))


def exact(figure: str, setting: str, value: float, unit: str = "×") -> Row:
    """Return a value without repeats: a ratio of counts, or a share of a single run."""
    return Row(figure, setting, value, value, value, unit, 1)


def best(times: Times, names: Sequence[str]) -> str:
    """Return the contender with the smallest median."""
    return min(names, key=lambda name: statistics.median(times[name]))


def bytes_kept(model: nn.Module, loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass, without parameters, buffers and the batch."""
    given = (*model.parameters(), *model.buffers(), *inputs)
    excluded = {t.untyped_storage().data_ptr() for each in given for t in plain_tensors(each, "")}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def operations(run: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products and convolutions in a run, backward pass included."""
    with FlopCounterMode(display=False) as counter:
        run()  # the counter's hooks are new to the model, which examines mixed batches with them first
        before = counter.get_total_flops()
        run()
    return counter.get_total_flops() - before


def profile(figure: str, setting: str, run: Callable[[], object], most: int = 8) -> Iterator[Row]:
    """Return the most expensive operators' shares of a run's time, each without the operators that it calls."""
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
    """Measure the peak memory of ``run`` above that held before it (``max_memory_allocated`` on a GPU, else RSS).

    On a CPU (Linux only) the peak is that of the whole process: call it through `in_new_process`.
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
    # not getrusage: a process inherits its parent's maximum
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def in_new_process(function: Callable[..., int], *arguments: object) -> int:
    """Call a module's function in a new process, and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resnet50() -> nn.Module:
    """Build torchvision's ResNet-50 with random weights, and norms that have the statistics of a batch of noise.

    Its feature maps are of the size of a trained network's. With the statistics that norms start with, they grow with
    every block until gelu and its gradient give subnormal numbers, with which a CPU takes many times as long.
    """
    net = torchvision.models.resnet50(weights=None)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 96, 96))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


OPTIMISER = "fused AdamW"
"""How `optimiser` is named in settings."""


def optimiser(parameters: Iterable[nn.Parameter], lr: float = 1e-5) -> torch.optim.Optimizer:
    """Return what every contender's steps end with: torch's AdamW in its fused form, as in `visadapt.training.Recipe`.

    The other forms take several times as long on a CPU, and the more so the more parameters there are.
    """
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


class Step:
    """A training step: forward, backward and a step of the `optimiser` on the same batch.

    With ``autocast`` the forward pass runs under autocast to bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        forward: Callable[[nn.Module], Tensor],
        labels: Tensor,
        autocast: bool = False,
    ) -> None:
        self.model, self._forward, self._labels, self._autocast = model.train(), forward, labels, autocast
        self.trained = sum(p.numel() for p in parameters)
        self._optimiser = optimiser(parameters)

    def loss(self) -> Tensor:
        """Compute the loss on the batch."""
        with torch.autocast(self._labels.device.type, torch.bfloat16, enabled=self._autocast):
            return nn.functional.cross_entropy(self._forward(self.model), self._labels)

    def __call__(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        self._optimiser.step()


_END = float("inf")
"""Time, by ``time.perf_counter``, after which nothing is repeated."""


def parse_args(description: str | None, **defaults: int) -> argparse.Namespace:
    """Parse the command line of one benchmark, with integer options, ``--device`` and ``--budget``; seed torch."""
    global _END
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, help="seconds after which nothing is repeated; default: no such time")
    args = parser.parse_args()
    if args.budget is not None:
        _END = time.perf_counter() + args.budget
    torch.manual_seed(0)
    return args


def print_rows(rows: Iterator[Row]) -> None:
    """Print each row as a line of JSON as soon as it is known; on a GPU, the memory that was allocated comes last."""
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
    if torch.cuda.is_initialized():
        megabytes = torch.cuda.max_memory_allocated() / 1e6
        figure = f"max_memory_allocated: {Path(sys.argv[0]).stem}"
        print(json.dumps(asdict(exact(figure, "the whole benchmark", megabytes, "MB"))), flush=True)
