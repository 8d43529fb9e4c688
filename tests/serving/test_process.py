"""``visadapt serve`` as a process: it starts, answers, drains on SIGTERM, and replaces a worker that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("typer")
import httpx
from typer.testing import CliRunner
from uvicorn.supervisors import Multiprocess

from tests.serving.conftest import CLASSES, png
from visadapt import VisadaptError
from visadapt.cli.app import app
from visadapt.serving import Server
from visadapt.serving.processes import STARTUP_FAILED, Processes

TOKEN = "a-token-of-more-than-16"
IMAGE = [("image", ("a.png", png()))]


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-c", "from visadapt.cli import main; main()", "serve", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"listening at (http://\S+)\n", line)
        assert found, line + process.stderr.read()
        with httpx.Client(base_url=found.group(1), timeout=60) as client:
            until = time.monotonic() + 120
            # processes listen before they have loaded the backbone: the first request waits
            while client.get("/readyz").status_code != 200 and time.monotonic() < until:
                time.sleep(0.1)
            yield process, client
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def test_sigterm_drains(folder: Path) -> None:
    with serving(folder, "--max-wait-ms", 1500, "--log-requests") as (process, client):
        answers: list[httpx.Response] = []

        def ask(task: str) -> None:
            answers.append(httpx.post(f"{client.base_url}/v1/predict", data={"task": task}, files=IMAGE, timeout=60))

        threads = [threading.Thread(target=ask, args=(task,)) for task in ("flowers", "birds", "cars")]
        for thread in threads:
            thread.start()
        # all three wait for their batch to fill
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert sorted(answer.json()["task"][0] for answer in answers) == ["birds", "cars", "flowers"]
        assert process.wait(60) == -signal.SIGTERM or process.returncode == 0
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
        assert sum(line["path"] == "/v1/predict" and line["status"] == 200 for line in lines) == 3


def again(client: httpx.Client) -> Any:
    """The digest in an answer, by a new connection; None as long as there is none."""
    try:
        url = f"{client.base_url}/v1/predict"
        answer = httpx.post(url, data={"task": "flowers"}, files=IMAGE, headers=client.headers, timeout=60)
    except httpx.TransportError:
        return None
    return answer.json().get("digest")


def refusal(client: httpx.Client) -> str | None:
    """The name of the error of a new connection; None if it is answered."""
    try:
        httpx.get(f"{client.base_url}/healthz", timeout=60)
    except httpx.TransportError as error:
        return type(error).__name__
    return None


SUPERVISOR = """
import multiprocessing, time
from visadapt.serving.processes import end_with_supervisor

def work():
    end_with_supervisor()
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
"""


def test_a_process_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.kill()
        killed = time.monotonic()
        # both have the pipe open: it ends when both have
        assert supervisor.stdout.read() == ""
        assert time.monotonic() - killed < 60


@pytest.mark.slow
def test_several_processes_share_a_port_and_one_that_dies_is_replaced(folder: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    options = ("--host", "0.0.0.0", "--token-file", token, "--workers", 2)
    with serving(folder, *options) as (process, client):
        assert client.get("/v1/tasks").status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"

        first = again(client)
        assert first is not None
        assert "visadapt_requests_total" in client.get("/metrics").text
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        for pid in workers:
            os.kill(int(pid), signal.SIGKILL)
        until = time.monotonic() + 120
        while (answer := again(client)) is None and time.monotonic() < until:
            time.sleep(0.2)
        assert answer == first
        # those that died are said and counted, and what they had in memory is not
        assert process.stderr is not None
        said = {process.stderr.readline() for _ in workers}
        assert said == {f"process {pid} died (-9) and is replaced\n" for pid in workers}
        time.sleep(0.5)
        found = dict(re.findall(r"^visadapt_(\w+) ([\d.]+)$", client.get("/metrics").text, re.MULTILINE))
        assert float(found["worker_restarts_total"]) in (1, 2)  # the second may still start
        assert float(found["tasks_loaded"]) <= 2 * len(CLASSES)
        process.send_signal(signal.SIGTERM)
        late = {refusal(client) for _ in iter(process.poll, None) if not time.sleep(0.02)}
        assert process.wait(60) in (0, -signal.SIGTERM)
        # what comes after the port is closed is refused, not kept without an answer
        assert late <= {None, "ConnectError"}


def test_a_process_that_does_not_start_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes.__new__(Processes)  # without handlers of signals
    ended: Any = SimpleNamespace(process=SimpleNamespace(exitcode=STARTUP_FAILED))
    processes.processes, processes.should_exit, processes._failed = [ended], threading.Event(), False
    monkeypatch.setattr(Multiprocess, "run", lambda self: self.keep_subprocess_alive())
    with pytest.raises(VisadaptError, match="did not start"):
        processes.run()
    assert processes.should_exit.is_set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "error: no file or folder nowhere"),
        ((".",), "there is no task file: name the backbone with"),
        ((".", "--host", "0.0.0.0"), "can be reached from other machines"),
        ((".", "--token-file", "none"), "cannot read the token"),
        ((".", "--engine", "rey"), "no engine 'rey'; did you mean 'ray'?"),
    ],
)
def test_what_it_is_not_started_with(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_warm_up_that_fails_ends_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(server: Server) -> Server:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Server, "start", fails)
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: the warm-up failed: no memory"


def test_a_port_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", str(folder), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "cannot listen at http://127.0.0.1:" in result.stderr
    assert "in use" in result.stderr
