"""The commands and the code of docs/serving.md, run as a reader would."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("typer")

from tests.serving.conftest import png

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")

SHORT = """
import dataclasses
from visadapt.data import image_sources
whole = image_sources._bundled
def part(name):
    found = whole(name)
    return dataclasses.replace(found, splits={k: v.subset(range(200)) for k, v in found.splits.items()})
image_sources._bundled = part
"""
"""The program that runs the commands takes 200 images per split of the bundled sets: seconds instead of minutes."""

ASKED = """
import json
from pathlib import Path
from fastapi.testclient import TestClient
with TestClient(app) as client:
    for task in ("cifar10", "cifar1O"):
        said = client.post(f"/photos/{task}", content=Path("photo.png").read_bytes())
        print(json.dumps([said.status_code, said.json()]))
"""
"""What asks the application of the page."""


@pytest.mark.slow
def test_the_three_commands(tmp_path: Path) -> None:
    commands = re.findall(r"^(?:mkdir|visadapt|curl) .*$", PAGE.partition("## What happens")[0], re.MULTILINE)
    folder, first, second, serve, curl = commands
    assert [each.split()[0] for each in commands] == ["mkdir", "visadapt", "visadapt", "visadapt", "curl"]
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    script = tmp_path / "bin" / "visadapt"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{SHORT}from visadapt.cli import main\nmain()\n")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "photo.png").write_bytes(png(0, (64, 48)))
    for command in (folder, first, second):
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    server = subprocess.Popen(f"exec {serve} --port {port}", shell=True, cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 120
        ready = ["curl", "-sf", f"http://127.0.0.1:{port}/readyz"]
        while subprocess.run(ready, check=False, capture_output=True).returncode:
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.3)
        said = subprocess.run(
            curl.replace("8000", port), shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True
        )
        answer = json.loads(said.stdout)
        assert answer["task"] == ["cifar10"]
        assert len(answer["predictions"][0]) == 3
        program, application = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        said = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
        lines = said.stdout.decode().splitlines()
        assert [line.split()[0] for line in lines] == ["cifar10", "mnist"]
        best = answer["predictions"][0][0]
        assert lines[0] == f"cifar10 {best['label']} {best['score']:.2f}"
        said = subprocess.run(
            [sys.executable, "-c", application + ASKED], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
        one, unknown = map(json.loads, said.stdout.decode().splitlines())
        assert one == [200, {"label": best["label"], "score": pytest.approx(best["score"], abs=1e-4)}]
        assert unknown == [404, {"detail": "no task 'cifar1O'; did you mean 'cifar10'?"}]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()


def test_the_page_names_every_error_and_route() -> None:
    from visadapt.serving.refusal import STATUS

    assert [name for name in STATUS if f"`{name}`" not in PAGE] == []
    assert [str(status) for status in STATUS.values() if str(status) not in PAGE] == []
