"""Send requests to a server while its task files are added, replaced, broken and removed, and check every answer.

python -m benchmarks.churn --requests 20480        # writes what happened to docs/serving.md

Every answer names the version of its task, and must be bit for bit what this version gives, alone, in another process.
Fewer tasks fit in memory than are asked for, so that tasks are loaded and evicted all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import visadapt
from visadapt.data.hub import resolve
from visadapt.data.inputs import from_description
from visadapt.files import replacing
from visadapt.optional import require
from visadapt.serving import Limits, Server, ServingError

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- result: python -m benchmarks.churn -->", "<!-- end of result -->"

BUILD = {"pretrained": False, "channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 4}
NOTES = {"backbone": {"name": "timm/resnet18", "build": BUILD}, "inputs": {"kind": "images", "size": 16}}

DOCUMENTED = ("unknown_task", "broken_task")
"""Errors that a request may be answered with while files are removed and broken."""

CLIENTS, ROUNDS = 16, 8


def image(seed: int) -> bytes:
    """Make an image file of noise."""
    pil, file = require("PIL.Image", "an image", "pillow"), io.BytesIO()
    pil.frombytes("RGB", (20, 18), Random(seed).randbytes(3 * 20 * 18)).save(file, "PNG")
    return file.getvalue()


IMAGES = [image(seed) for seed in range(8)]


def network() -> nn.Module:
    """Build the backbone that the files name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve("timm/resnet18", **BUILD).eval()


def write_versions(folder: Path, tasks: int, versions: int) -> dict[str, list[Path]]:
    """Write several versions of each task, which differ in their weights, norms and number of classes."""
    model, found = network(), {}
    for task in range(tasks):
        name = f"t{task}"
        found[name] = [
            _written(model, folder / f"{version}", name, 100 * task + version) for version in range(versions)
        ]
    return found


def _written(model: nn.Module, folder: Path, name: str, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms = ("affine", "frozen", "full")[seed % 3]
        visadapt.inject(model, m=2, task=name, num_classes=2 + seed % 3, norms=norms)
        with torch.no_grad():
            for parameter in visadapt.parameters(model, name):
                parameter += 0.1 * torch.randn_like(parameter)
    folder.mkdir(exist_ok=True)
    path = visadapt.save(model, name, folder / f"{name}.visadapt", notes=NOTES)
    visadapt.remove(model, name)
    return path


def write_answers(folder: Path, target: Path) -> None:
    """Write the logits of every version of every task for every image, each task alone in a fresh network."""
    inputs = from_description(NOTES["inputs"])
    pil = require("PIL.Image", "an image", "pillow")
    batches = [inputs(inputs.read([pil.open(io.BytesIO(data))])) for data in IMAGES]
    answers = {}
    for path in sorted(folder.rglob("*.visadapt")):
        model = network()
        visadapt.load(model, path)
        digest = visadapt.task_file.read(path).digest
        with torch.no_grad():
            for number, batch in enumerate(batches):
                answers[f"{digest}/{number}"] = model(batch)[0].clone()
    save_file(answers, target)


@dataclass
class Known:
    """Versions of task files, and the answers of each of them as another process gives them.

    Attributes:
        versions: files by task.
        answers: logits by ``digest/image``.
    """

    versions: dict[str, list[Path]]
    answers: dict[str, Tensor]

    @classmethod
    def made(cls, folder: Path, tasks: int = 8, versions: int = 3) -> Known:
        """Write the files to a folder, and let another process answer."""
        written = write_versions(folder, tasks, versions)
        target = folder / "answers.safetensors"
        command = [sys.executable, "-m", "benchmarks.churn", "--answers", str(folder), str(target)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
        return cls(written, load_file(target))


class Churn:
    """Changes a folder that is being served: adds, replaces, breaks and removes files.

    Args:
        folder: the folder.
        versions: files to choose from, by task.
    """

    def __init__(self, folder: Path, versions: dict[str, list[Path]]) -> None:
        self.done: Counter[str] = Counter()
        self._folder, self._versions, self._random = folder, versions, Random(1)
        self._lock = threading.Lock()

    def change(self) -> None:
        """Change one file at random."""
        with self._lock:
            name = self._random.choice(list(self._versions))
            target, draw = self._folder / f"{name}.visadapt", self._random.random()
            if draw < 0.1:
                target.unlink(missing_ok=True)
                self.done["removed"] += 1
                return
            data = self._random.choice(self._versions[name]).read_bytes()
            data = data[:-3] + b"bad" if draw < 0.2 else data
            partial = self._folder / f".{name}.part"
            partial.write_bytes(data)
            os.replace(partial, target)
            self.done["broken" if draw < 0.2 else "replaced"] += 1


@dataclass
class Outcome:
    """What happened to the requests.

    Attributes:
        requests: number of requests.
        counts: answered, or the name of the error.
        wrong: descriptions of answers and errors that must not be.
        changes: of files, by kind.
        memory: bytes of the process after each eighth of the requests.
        metrics: of the server.
    """

    requests: int
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return self.requests - sum(self.counts.values())

    @property
    def growth(self) -> float:
        """Memory after the last requests relative to that after the first half."""
        return self.memory[-1] / self.memory[len(self.memory) // 2 - 1]

    def __str__(self) -> str:
        refused = self.requests - self.counts["answered"] - self.lost
        changes = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.changes.items()))
        return (
            f"{self.requests:,} requests while files changed ({changes}), with {self.metrics['loads_total']:,.0f} "
            f"loads and {self.metrics['evictions_total']:,.0f} evictions: {self.counts['answered']:,} answered, "
            f"{len(self.wrong):,} of them wrong; {refused:,} refused because the file was removed or broken; "
            f"{self.lost:,} lost; memory after the last request {self.growth:.3f} × that at half time."
        )


async def _sent(server: Server, churn: Churn, known: Known, outcome: Outcome, exact: bool) -> None:
    random, names = Random(2), [*known.versions, "never"]

    async def one() -> None:
        # rank r is asked for 1/r as often as the first
        count = random.choice((1, 1, 1, 2, 3))
        tasks = random.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)
        numbers = [random.randrange(len(IMAGES)) for _ in tasks]
        try:
            found = await server.predict(tasks, [IMAGES[number] for number in numbers])
        except ServingError as error:
            outcome.counts[error.name] += 1
            if error.name not in DOCUMENTED:
                outcome.wrong.append(str(error))
            return
        outcome.counts["answered"] += 1
        for task, number, answer in zip(tasks, numbers, found, strict=True):
            expected = known.answers[f"{answer.digest}/{number}"]
            if answer.task != task or not _same(answer.logits, expected, exact):
                outcome.wrong.append(f"{task} {answer.digest[:8]} {number}: {answer.logits}, not {expected}")

    async def client(each: int) -> None:
        for i in range(each):
            await one()
            if i % 10 == 0:
                await asyncio.get_running_loop().run_in_executor(None, churn.change)

    for _ in range(ROUNDS):
        await asyncio.gather(*(client(outcome.requests // CLIENTS // ROUNDS) for _ in range(CLIENTS)))
        gc.collect()
        outcome.memory.append(_resident())


def _same(found: Tensor, expected: Tensor, exact: bool) -> bool:
    if found.shape != expected.shape:
        return False
    return torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=0, atol=1e-5)


def run(requests: int, exact: bool, known: Known, folder: Path) -> Outcome:
    """Send requests while files change.

    Args:
        requests: how many; rounded down to a multiple of 128.
        exact: whether the server runs every sample alone; if not, answers may differ by rounding.
        known: the files and their answers.
        folder: an empty folder to serve.
    """
    (folder / "t0.visadapt").write_bytes(known.versions["t0"][0].read_bytes())
    churn = Churn(folder, known.versions)
    for _ in range(20):
        churn.change()
    outcome = Outcome(requests // (CLIENTS * ROUNDS) * CLIENTS * ROUNDS, changes=churn.done)

    async def main() -> None:
        limits = Limits(queue=10_000)
        async with Server(folder, max_tasks=4, max_batch=16, max_wait=0.001, exact=exact, limits=limits) as server:
            await _sent(server, churn, known, outcome, exact)
            for name in ("loads_total", "evictions_total", "worker_restarts_total"):
                outcome.metrics[name] = server.metrics.registry.get_sample_value(f"visadapt_{name}")

    asyncio.run(main())
    return outcome


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_480)
    parser.add_argument("--page", type=Path, default=PAGE, help="page that the result is written to")
    parser.add_argument("--answers", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.answers:
        write_answers(*args.answers)
        return
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder, "served")
        served.mkdir()
        outcome = run(args.requests, True, Known.made(Path(folder)), served)
    said = f"`python -m benchmarks.churn --requests {args.requests}`: {outcome}"
    print(said, *outcome.wrong[:20], sep="\n")
    write_page(args.page, said)
    if outcome.wrong or outcome.lost:
        sys.exit(1)


def write_page(page: Path, said: str) -> None:
    """Put the result between its marks on a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    with replacing(page) as partial:
        partial.write_text(f"{before}{BEGIN}\n\n{said}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
