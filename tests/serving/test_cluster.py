"""Replicas behind Ray Serve on a local cluster: right answers, and a task stays where it is in memory."""

from __future__ import annotations

import base64
import re
import socket
import warnings
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("ray.serve")
import httpx

from tests.serving.conftest import CLASSES, alone, png

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""On a busy machine Ray's front takes longer to start than the 5 seconds that it is given."""


def test_a_cluster_answers_and_keeps_tasks_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATIENT.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray import serve

    from visadapt.serving.cluster import application
    from visadapt.serving.running import Options

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    root = str(Path(__file__).parents[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # no processor beside those of the replicas
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", **PATIENT}})  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = Options((str(folder),), server={"exact": True, "max_tasks": 2}, workers=2, port=port)
        serve.run(application(options, ray_actor_options={"num_cpus": 1}), name="visadapt", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def predict(task: object, *images: bytes) -> httpx.Response:
                inputs = [{"image": base64.b64encode(data).decode()} for data in images]
                return client.post("/v1/predict", json={"task": task, "inputs": inputs, "top": 5})

            names = [*CLASSES, *CLASSES]
            answer = predict(names, *(png(seed) for seed in range(8)))
            assert answer.status_code == 200, answer.text
            assert answer.json()["task"] == names
            for seed, (name, scores) in enumerate(zip(names, answer.json()["predictions"], strict=True)):
                expected = alone(folder / f"{name}.visadapt", png(seed)).softmax(-1).sort(descending=True).values
                assert [score["score"] for score in scores] == expected.tolist()
            # two replicas with two tasks each: four tasks, none of which has to move any more
            for _ in range(5):
                for name in CLASSES:
                    assert predict(name, png()).status_code == 200
            assert client.get("/v1/tasks/birds").json()["classes"] == 5
            counted = dict(re.findall(r"^(visadapt_\w+(?:{.*})?) ([\d.]+)$", client.get("/metrics").text, re.MULTILINE))
            # of the front, and of both replicas: every task was loaded by one of them
            assert float(counted['visadapt_requests_total{outcome="ok"}']) == 21
            assert float(counted["visadapt_tasks_loaded"]) == 4
            assert float(counted["visadapt_wait_seconds_count"]) >= 28
            wrong = predict("bird", png())
            assert (wrong.status_code, wrong.json()["error"]["name"]) == (404, "unknown_task")
            assert predict("birds", b"no image").status_code == 422
            assert client.get("/v1/tasks/bird").status_code == 404
            assert client.get("/readyz").status_code == 200
            (folder / "birds.visadapt").unlink()
            assert predict("birds", png()).status_code == 404
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_cluster_of_this_machine_has_room_for_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from visadapt.serving.cluster import _connect

    found: list[dict[str, object]] = []

    def init(**options: object) -> None:
        found.append(options)
        if options.get("address") == "auto":
            raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    _connect(1000)  # more than there are processors
    assert found[-1]["num_cpus"] == 1000
