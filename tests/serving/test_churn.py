"""Many requests while tasks are loaded, replaced, removed and evicted: no answer is wrong, and none is lost."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import visadapt
from tests.models import stir
from tests.serving.conftest import NOTES, png
from visadapt.data.hub import resolve
from visadapt.serving import Limits, Server, ServingError

BUILD = {"pretrained": False, "channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 4}
TINY = {"backbone": {"name": "timm/resnet18", "build": BUILD}, "inputs": {**NOTES["inputs"], "size": 16}}
IMAGES = [png(seed, (20, 18)) for seed in range(8)]


def tiny() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve("timm/resnet18", **BUILD).eval()


def write_versions(folder: Path, tasks: int, versions: int) -> dict[str, list[Path]]:
    """Several versions of each task, which differ in their weights, norms and number of classes."""
    model, found = tiny(), {}
    for task in range(tasks):
        name = f"t{task}"
        found[name] = []
        for version in range(versions):
            seed = 100 * task + version
            norms = ("affine", "frozen", "full")[seed % 3]
            torch.manual_seed(seed)
            visadapt.inject(model, m=2, task=name, num_classes=2 + seed % 3, norms=norms)
            stir(model, name, seed)
            path = folder / f"{version}" / f"{name}.visadapt"
            path.parent.mkdir(exist_ok=True)
            visadapt.save(model, name, path, notes=TINY)
            visadapt.remove(model, name)
            found[name].append(path)
    return found


ORACLE = """
import sys
from tests.serving.test_churn import write_answers
write_answers(sys.argv[1], sys.argv[2])
"""


def write_answers(folder: str, target: str) -> None:
    """The logits of every version of every task for every image, each task alone in a fresh network."""
    inputs = visadapt.data.inputs.from_description(TINY["inputs"])
    batches = [inputs(inputs.read([Image.open(io.BytesIO(data))])) for data in IMAGES]
    answers = {}
    for path in sorted(Path(folder).rglob("*.visadapt")):
        model = tiny()
        visadapt.load(model, path)
        digest = visadapt.task_file.read(path).digest
        with torch.no_grad():
            for number, batch in enumerate(batches):
                answers[f"{digest}/{number}"] = model(batch)[0].clone()
    save_file(answers, target)


class Churn:
    """Changes a folder that is being served: adds, replaces, breaks and removes files."""

    def __init__(self, folder: Path, versions: dict[str, list[Path]]) -> None:
        self.folder, self.versions, self.random = folder, versions, Random(1)
        self.done: Counter[str] = Counter()
        self.lock = threading.Lock()

    def change(self) -> None:
        with self.lock:
            self._change()

    def _change(self) -> None:
        name = self.random.choice(list(self.versions))
        target, draw = self.folder / f"{name}.visadapt", self.random.random()
        if draw < 0.1:
            target.unlink(missing_ok=True)
            self.done["removed"] += 1
            return
        data = self.random.choice(self.versions[name]).read_bytes()
        if draw < 0.2:
            data = data[:-3] + b"bad"
            self.done["broken"] += 1
        partial = self.folder / f".{name}.part"
        partial.write_bytes(data)
        os.replace(partial, target)
        self.done["replaced"] += 1


async def churned(server: Server, churn: Churn, requests: int, answers: dict[str, torch.Tensor], exact: bool) -> Any:
    """Send requests while files change, and check each answer against the version that it names."""
    random, outcome = Random(2), Counter[str]()
    names = [*churn.versions, "never"]
    memory: list[int] = []
    wrong: list[str] = []

    async def one() -> None:
        # rank r is asked for 1/r as often as the first
        count = random.choice((1, 1, 1, 2, 3))
        tasks = random.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)
        numbers = [random.randrange(len(IMAGES)) for _ in tasks]
        try:
            found = await server.predict(tasks, [IMAGES[number] for number in numbers])
        except ServingError as error:
            outcome[error.name] += 1
            if error.name not in ("unknown_task", "broken_task"):
                wrong.append(str(error))
            return
        outcome["answered"] += 1
        for task, number, answer in zip(tasks, numbers, found, strict=True):
            expected = answers[f"{answer.digest}/{number}"]
            same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5)
            if answer.task != task or answer.logits.shape != expected.shape or not same(answer.logits, expected):
                wrong.append(f"{task} {answer.digest[:8]} {number}")

    async def client(each: int) -> None:
        for i in range(each):
            await one()
            if i % 10 == 0:
                await asyncio.get_running_loop().run_in_executor(None, churn.change)

    clients, rounds = 16, 8
    for _ in range(rounds):
        await asyncio.gather(*(client(requests // clients // rounds) for _ in range(clients)))
        gc.collect()
        memory.append(resident())
    return outcome, wrong, memory


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Path]], dict[str, torch.Tensor]]:
    """Files, and the answers of each of them as another process gives them."""
    folder = tmp_path_factory.mktemp("versions")
    versions = write_versions(folder, tasks=8, versions=3)
    command = [sys.executable, "-c", ORACLE, str(folder), str(folder / "answers")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environment)
    return versions, load_file(folder / "answers")


@pytest.mark.parametrize(
    ("requests", "exact"),
    [(512, True), (512, False), pytest.param(20_480, True, marks=pytest.mark.slow)],
)
def test_every_answer_is_that_of_the_task_alone_or_a_documented_error(
    requests: int, exact: bool, known: tuple[dict[str, list[Path]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    versions, answers = known
    served = tmp_path / "served"
    served.mkdir()
    (served / "t0.visadapt").write_bytes(versions["t0"][0].read_bytes())
    churn = Churn(served, versions)
    for _ in range(20):
        churn.change()

    async def main() -> Any:
        limits = Limits(queue=10_000)
        async with Server(served, max_tasks=4, max_batch=16, max_wait=0.001, exact=exact, limits=limits) as server:
            found = await churned(server, churn, requests, answers, exact)
            return (*found, server.metrics)

    outcome, wrong, memory, metrics = asyncio.run(main())
    assert wrong == []
    # none is lost: each was answered, or refused for a documented reason
    assert set(outcome) <= {"answered", "unknown_task", "broken_task"}
    assert sum(outcome.values()) == requests
    assert outcome["answered"] > requests / 3
    assert min(churn.done.values()) > 0
    for name in ("evictions_total", "loads_total"):
        assert metrics.registry.get_sample_value(f"visadapt_{name}") > 10
    assert metrics.registry.get_sample_value("visadapt_worker_restarts_total") == 0
    if requests > 10_000:
        # flat: the second half of the requests adds less than 2 % to the process
        assert memory[-1] < 1.02 * memory[len(memory) // 2 - 1], memory
