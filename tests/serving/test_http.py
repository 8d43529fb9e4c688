"""The HTTP API: every route, every error as JSON with a name and a remedy, and what is safe by default."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import pickle
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
import httpx

from tests.serving.conftest import CLASSES, alone, png
from visadapt import VisadaptError
from visadapt.serving import Limits, Server, ServingError
from visadapt.serving.app import build_app
from visadapt.serving.guard import Guard, log
from visadapt.serving.metrics import Metrics, summed
from visadapt.serving.refusal import STATUS
from visadapt.serving.running import Options, is_loopback
from visadapt.serving.service import LocalService

LIMITS = Limits(body=80_000, image=30_000, pixels=5_000, text=40, inputs=8)
TOKEN = "a-token-of-more-than-16"
HOSTS = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def server(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.visadapt").write_bytes(b"not a task")
    server = Server(folder, limits=LIMITS, exact=True).start()
    yield server
    assert server.stop(30)


def ask(
    server: Server,
    method: str,
    path: str,
    *,
    base: str = "http://127.0.0.1:8000",
    token: str | None = None,
    **body: Any,
) -> httpx.Response:
    app = build_app(LocalService(server), token=token, hosts=None if token else HOSTS)

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **body)

    return asyncio.run(main())


def encoded(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def predict(server: Server, body: Any, **options: Any) -> httpx.Response:
    return ask(server, "POST", "/v1/predict", json=body, **options)


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"name", "message", "remedy"}
    assert all(error.values())
    assert STATUS[error["name"]] == status
    return error


def test_predict_by_json(server: Server, written: Path) -> None:
    images = [png(seed) for seed in range(3)]
    response = predict(server, {"task": "birds", "inputs": [encoded(data) for data in images], "top": 2})
    assert response.status_code == 200
    found = response.json()
    assert set(found) == {"predictions", "task", "digest", "model"}
    assert found["task"] == ["birds"] * 3
    assert found["model"] == server.model_digest
    assert found["digest"] == [server.pool.entry("birds").digest] * 3
    for data, prediction in zip(images, found["predictions"], strict=True):
        scores = alone(written / "birds.visadapt", data).softmax(-1)
        assert [p["score"] for p in prediction] == scores.topk(2).values.tolist()


def test_predict_by_a_form_and_by_json_agree(server: Server) -> None:
    files = [("image", ("a.png", png(1))), ("image", ("b.png", png(2)))]
    form = ask(server, "POST", "/v1/predict", data={"task": ["flowers", "cars"], "top": "3"}, files=files)
    same = predict(server, {"task": ["flowers", "cars"], "inputs": [encoded(png(1)), encoded(png(2))], "top": 3})
    assert form.json() == same.json()
    assert form.json()["task"] == ["flowers", "cars"]
    url = {"image": f"data:image/png;base64,{encoded(png(1))['image']}"}
    as_browsers = predict(server, {"task": "flowers", "inputs": [url], "top": 3}).json()
    assert as_browsers["predictions"] == form.json()["predictions"][:1]


def test_tasks(server: Server) -> None:
    found = ask(server, "GET", "/v1/tasks").json()
    assert found["model"] == server.model_digest
    tasks = {task["name"]: task for task in found["tasks"]}
    assert list(tasks) == sorted([*CLASSES, "broken"])
    assert "not a whole task file" in tasks["broken"]["error"]["message"]
    assert tasks["broken"]["loaded"] is False
    one = ask(server, "GET", "/v1/tasks/birds").json()
    assert one == tasks["birds"]
    assert one["labels"] == ["iris", "lily", "rose", "tulip", "aster"]
    assert (one["classes"], one["input"], one["norms"], one["method"]) == (5, "image", "frozen", "Bottleneck(m=4)")
    assert one["bytes"] > one["values"] > 0
    assert error_of(ask(server, "GET", "/v1/tasks/broken"), 500)["name"] == "broken_task"
    assert "did you mean 'birds'" in error_of(ask(server, "GET", "/v1/tasks/bird"), 404)["message"]
    for hostile in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "birds.visadapt", "birds%00"):
        assert error_of(ask(server, "GET", f"/v1/tasks/{hostile}"), 404)


def bomb(side: int) -> bytes:
    """A small file of a huge image: a valid header, and no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


IMAGE = [encoded(png())]


@pytest.mark.parametrize(
    ("body", "status", "name", "message"),
    [
        ({"task": "flower", "inputs": IMAGE}, 404, "unknown_task", "did you mean 'flowers'"),
        ({"task": "../flowers", "inputs": IMAGE}, 404, "unknown_task", "no task"),
        ({"task": "broken", "inputs": IMAGE}, 500, "broken_task", "not a whole task file"),
        ({"task": "flowers", "inputs": [{"text": "a"}]}, 422, "wrong_input", "must be of kind image"),
        ({"task": "flowers", "inputs": [{"text": "a" * 41}]}, 413, "too_large", "40 characters"),
        ({"task": "flowers", "inputs": [{"text": ["a", "b", "c"]}]}, 422, "invalid_request", "pair of strings"),
        ({"task": "flowers", "inputs": [{"image": "%%%"}]}, 422, "undecodable", "not base64"),
        ({"task": "flowers", "inputs": [{"image": "aGVsbG8="}]}, 422, "undecodable", "its format is unknown"),
        ({"task": "flowers", "inputs": [encoded(bomb(60_000))]}, 413, "too_large", "5,000 pixels"),
        ({"task": "flowers", "inputs": [encoded(bomb(10_000))]}, 413, "too_large", "5,000 pixels"),
        ({"task": "flowers", "inputs": [encoded(bomb(100))]}, 413, "too_large", "5,000 pixels"),
        ({"task": "flowers", "inputs": [encoded(b"0" * 30_001)]}, 413, "too_large", "30,000 bytes"),
        ({"task": "flowers", "inputs": [encoded(b"0" * 60_001)]}, 413, "too_large", "80,000 bytes"),
        ({"task": "flowers", "inputs": [{"image": "/etc/passwd"}]}, 422, "undecodable", ""),
        ({"task": "flowers", "inputs": [{"path": "/etc/passwd"}]}, 422, "invalid_request", "got 'path'"),
        ({"task": "flowers", "inputs": [{"url": "http://a"}]}, 422, "invalid_request", "got 'url'"),
        ({"task": "flowers", "inputs": [{"image": "", "text": ""}]}, 422, "invalid_request", "one key"),
        ({"task": "flowers", "inputs": [{}]}, 422, "invalid_request", "no key"),
        ({"task": "flowers", "inputs": []}, 422, "invalid_request", "at least one input"),
        ({"task": "flowers", "inputs": IMAGE * 9}, 413, "too_large", "8 inputs"),
        ({"task": "flowers", "inputs": IMAGE, "top": 0}, 422, "invalid_request", "top must be"),
        ({"task": "flowers", "inputs": IMAGE, "top": "3"}, 422, "invalid_request", "top: "),
        ({"task": 3, "inputs": IMAGE}, 422, "invalid_request", "task"),
        ({"task": "flowers"}, 422, "invalid_request", "inputs: Field required"),
        ({"task": "flowers", "inputs": IMAGE, "file": "a"}, 422, "invalid_request", "file: "),
        ({"task": "auto", "inputs": IMAGE}, 422, "invalid_request", "needs a decider"),
        ([], 422, "invalid_request", "the body: "),
    ],
)
def test_errors_have_a_name_and_a_remedy(server: Server, body: Any, status: int, name: str, message: str) -> None:
    error = error_of(predict(server, body), status)
    assert error["name"] == name
    assert message in error["message"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 20_000, b'{"task": 1e999999}', b'{"task": "\\ud800"}', b""])
def test_json_that_is_none(server: Server, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    error = error_of(ask(server, "POST", "/v1/predict", content=body, headers=kind), 422)
    assert error["name"] == "invalid_request"


@pytest.mark.parametrize(
    ("data", "files", "message"),
    [
        ({}, [("image", ("a.png", png()))], "must have a field 'task'"),
        ({"task": "flowers", "top": "-1"}, [("image", ("a.png", png()))], "top must be"),
        ({"task": "flowers", "path": "a"}, [("image", ("a.png", png()))], "got 'path'"),
        ({"task": "flowers", "image": "a"}, [("text", ("a.png", b"a"))], "must be"),
        ({"task": "flowers"}, [("text", ("a.txt", b"a"))], "'text' must be a field"),
        ({"task": "flowers"}, [("image", ("a.png", png()))] * 10, "the form cannot be read"),
    ],
)
def test_forms_that_are_refused(server: Server, data: Any, files: Any, message: str) -> None:
    error = error_of(ask(server, "POST", "/v1/predict", data=data, files=files), 422)
    assert message in error["message"]


def test_bodies_are_bounded_while_they_come(server: Server) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 10_000

    kind = {"content-type": "application/json"}
    error = error_of(ask(server, "POST", "/v1/predict", content=endless(), headers=kind), 413)
    assert "80,000 bytes" in error["message"]


def sent_to(server: Server, receive: Any) -> list[Any]:
    """What is sent to a client whose body comes from a function."""
    sent: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        guarded = build_app(LocalService(server))
        assert isinstance(guarded, Guard)
        guarded._patience = 0.05
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"",
                 "raw_path": b"/v1/predict", "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        await guarded(scope, receive, send)

    asyncio.run(main())
    return sent


def test_a_client_that_sends_nothing_is_not_waited_for(server: Server) -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    start, body = sent_to(server, receive)
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["name"] == "timeout"


def test_a_client_that_leaves_is_not_a_failure_of_the_server(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with caplog.at_level(logging.INFO):
        assert sent_to(server, receive)[0]["status"] == 408
    assert [record.name for record in caplog.records] == [log.name]


def outcomes(server: Server) -> dict[str, float]:
    """The number of requests for predictions by outcome."""
    text = server.metrics.text().decode()
    found = re.findall(r'^visadapt_requests_total{outcome="(\w+)"} ([\d.]+)$', text, re.MULTILINE)
    return {outcome: float(count) for outcome, count in found}


def test_every_request_is_counted_whoever_refuses_it(server: Server) -> None:
    before = outcomes(server)
    predict(server, {"task": "maps", "inputs": IMAGE})
    predict(server, {"task": "flower", "inputs": IMAGE})
    predict(server, {"task": "maps", "inputs": IMAGE}, token=TOKEN)  # the client has another
    predict(server, {"task": "maps", "inputs": IMAGE}, base="http://evil.example")
    ask(server, "POST", "/v1/predict", content=b"x" * (LIMITS.body + 1))  # refused by its length
    ask(server, "GET", "/v1/predict")
    ask(server, "GET", "/v1/tasks/none")
    after = outcomes(server)
    added = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    names = ("ok", "unknown_task", "unauthorized", "wrong_host", "too_large", "method_not_allowed")
    assert added == dict.fromkeys(names, 1.0)


def test_unknown_routes_and_methods(server: Server) -> None:
    assert error_of(ask(server, "GET", "/v1"), 404)["name"] == "not_found"
    response = ask(server, "GET", "/v1/predict")
    assert error_of(response, 405)["name"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(ask(server, "GET", "/web/page.html"), 404)


def test_the_token(server: Server) -> None:
    wrong = ("Bearer wrong", f"Basic {TOKEN}", "", f"Bearer {TOKEN}x")
    for headers in ({}, *({"authorization": value} for value in wrong)):
        for method, path in (
            ("POST", "/v1/predict"),
            ("GET", "/v1/tasks"),
            ("GET", "/v1/tasks/a"),
            ("GET", "/metrics"),
        ):
            response = ask(server, method, path, token=TOKEN, headers=headers)
            assert error_of(response, 401)["name"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert ask(server, "GET", "/v1/tasks", token=TOKEN, headers=headers, base="http://example.org").status_code == 200
    assert ask(server, "GET", "/healthz", token=TOKEN).status_code == 200


@pytest.mark.parametrize("base", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000", "http://LOCALHOST"])
def test_the_names_of_this_machine(server: Server, base: str) -> None:
    assert ask(server, "GET", "/v1/tasks", base=base).status_code == 200


@pytest.mark.parametrize("base", ["http://evil.example", "http://localhost.evil.example:8000", "http://10.0.0.1"])
def test_no_web_page_reaches_it_by_another_name(server: Server, base: str) -> None:
    assert error_of(ask(server, "GET", "/v1/tasks", base=base), 403)["name"] == "wrong_host"


def test_state_and_metrics(server: Server, written: Path) -> None:
    assert ask(server, "GET", "/healthz").json() == {"status": "ok"}
    assert ask(server, "GET", "/readyz").json() == {"status": "ready"}
    answer = predict(server, {"task": "maps", "inputs": IMAGE})
    assert answer.status_code == 200, answer.text
    error_of(predict(server, {"task": "flower", "inputs": IMAGE}), 404)
    response = ask(server, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    for line in (
        r'visadapt_requests_total\{outcome="ok"\} \d',
        r'visadapt_requests_total\{outcome="unknown_task"\} \d',
        r'visadapt_latency_seconds_bucket\{le="0.1",task="maps"\} \d',
        r"visadapt_wait_seconds_count \d",
        r"visadapt_batch_size_count \d",
        r"visadapt_tasks_loaded [1-4]\.0",
        r"visadapt_evictions_total \d",
        r"visadapt_worker_restarts_total 0\.0",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), line
    # a name that a client made up is not a label
    assert 'flower"' not in text
    waiting = Server(written)
    error = error_of(ask(waiting, "GET", "/readyz"), 503)
    assert error["name"] == "not_ready"
    assert ask(waiting, "GET", "/readyz").headers["retry-after"] == "1"
    assert error_of(predict(waiting, {"task": "maps", "inputs": IMAGE}), 503)


def test_pages_need_no_network(server: Server) -> None:
    for path in ("/", "/docs"):
        response = ask(server, "GET", path)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert policy.count("'sha256-") == 2
        assert "http://" not in response.text
        assert "https://" not in response.text
    schema = ask(server, "GET", "/openapi.json").json()
    assert set(schema["paths"]) == {"/v1/predict", "/v1/tasks", "/v1/tasks/{name}", "/healthz", "/readyz", "/metrics"}
    assert set(schema["paths"]["/v1/predict"]["post"]["responses"]) >= {"200", "401", "404", "413", "422", "503"}


def test_what_the_model_raises_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "entries", lambda: 1 / 0)
    error = error_of(ask(server, "GET", "/v1/tasks"), 500)
    assert "zero" not in json.dumps(error)


def test_a_line_of_json_per_request(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, log.name):
        predict(server, {"task": "cars\n{", "inputs": IMAGE})
        predict(server, {"task": ["cars", "maps"], "inputs": IMAGE})
        ask(server, "GET", "/v1/tasks", base="http://evil.example")
    first, second, third = (json.loads(record.message) for record in caplog.records if record.name == log.name)
    assert (first["status"], first["error"], first["task"]) == (404, "unknown_task", "cars\n{")
    assert (second["status"], second["task"], second["inputs"]) == (200, ["cars", "maps"], 1)
    assert (third["status"], third["error"], third["path"]) == (403, "wrong_host", "/v1/tasks")
    assert all(line["seconds"] >= 0 for line in (first, second, third))


def test_what_a_server_is_not_started_with(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(VisadaptError, match="give the token"):
            Options(("a",), host=host)
        assert not is_loopback(host)
    assert Options(("a",), host="::1").token() is None
    path = tmp_path / "token"
    for text, message in (("short", "16 or more"), ("a b" * 20, "without spaces"), ("ä" * 20, "cannot read")):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        with pytest.raises(VisadaptError, match=message):
            Options(("a",), token_file=str(path)).token()
    with pytest.raises(VisadaptError, match="cannot read the token"):
        Options(("a",), token_file=str(tmp_path / "none")).token()
    path.write_text(f"{TOKEN}\n", encoding="ascii")
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="can be read by other users"):
        assert Options(("a",), host="0.0.0.0", token_file=str(path)).token() == TOKEN
    for options in ({"port": 70_000}, {"port": True}, {"workers": 0}):
        with pytest.raises(VisadaptError, match="must be"):
            Options(("a",), **options)


def test_every_error_is_in_the_table_and_can_be_sent_to_another_process() -> None:
    error = ServingError("overloaded", "many", "wait", retry_after=3)
    again = pickle.loads(pickle.dumps(error))
    assert (again.json(), again.retry_after, again.status) == (error.json(), 3, 503)
    assert all(400 <= status < 600 for status in STATUS.values())
    with pytest.raises(KeyError):
        ServingError("made_up", "", "")


def test_images_of_other_modes_and_formats(server: Server) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK", "LA"):
        file = io.BytesIO()
        Image.new(mode, (20, 20)).save(file, "TIFF")
        assert predict(server, {"task": "cars", "inputs": [encoded(file.getvalue())]}).status_code == 200, mode
    # of a format that is not decoded, though Pillow could
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "ICO")
    assert (
        error_of(predict(server, {"task": "cars", "inputs": [encoded(file.getvalue())]}), 422)["name"] == "undecodable"
    )
    assert torch.is_grad_enabled()


def test_metrics_of_several_processes_add_up() -> None:
    one, other = Metrics(), Metrics()
    one.requests.labels("ok").inc(3)
    other.requests.labels("ok").inc(2)
    other.requests.labels("overloaded").inc()
    for metrics, seconds in ((one, 0.003), (other, 1.5)):
        metrics.wait.observe(seconds)
        metrics.loaded.set(2)
    text = summed([one.text(), other.text()]).decode()
    for line in (
        'visadapt_requests_total{outcome="ok"} 5.0', 'visadapt_requests_total{outcome="overloaded"} 1.0',
        'visadapt_wait_seconds_bucket{le="0.005"} 1.0', 'visadapt_wait_seconds_bucket{le="+Inf"} 2.0',
        "visadapt_wait_seconds_sum 1.503", "visadapt_tasks_loaded 4.0",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert summed([one.text()]) == one.text()
