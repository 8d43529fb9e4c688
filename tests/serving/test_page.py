"""The page in a real browser: it lists the tasks, classifies an image and a text, and fits a phone, light and dark."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
import uvicorn
from PIL import Image

import visadapt
from tests.serving.conftest import LABELS, NOTES, network, png, write_text_task
from visadapt.serving import Server
from visadapt.serving.app import build_app
from visadapt.serving.service import LocalService

pytestmark = pytest.mark.slow

DRIVE = """<script>
const done = async () => {
  for (let i = 0; i < 200 && !document.querySelector("#tasks button"); i++) await new Promise(r => setTimeout(r, 50));
  STEPS
  for (let i = 0; i < 200 && $("result").hidden && $("error").hidden; i++) await new Promise(r => setTimeout(r, 50));
  await new Promise(r => setTimeout(r, 300));
  document.title = JSON.stringify({
    tasks: [...document.querySelectorAll("#tasks button")].map(b => b.firstChild.textContent),
    broken: [...document.querySelectorAll("#tasks .broken span")].map(s => s.textContent),
    labels: [...document.querySelectorAll(".bar > span:first-child")].map(s => s.textContent),
    shares: [...document.querySelectorAll(".track i")].map(i => parseFloat(i.style.width)),
    drawn: [...document.querySelectorAll(".track i")].map(i => i.offsetWidth / i.parentElement.offsetWidth * 100),
    preview: $("preview").naturalWidth,
    error: $("error").textContent,
    aside: $("tasks").scrollWidth - $("tasks").clientWidth,
    height: Math.max(0, ...[...document.querySelectorAll(".bar")].map(b => b.offsetHeight)),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
  });
};
done();
</script>"""

DROP = """
  const bytes = Uint8Array.from(atob("DATA"), c => c.charCodeAt(0)), moved = new DataTransfer();
  moved.items.add(new File([bytes], "a.png", {type: "image/png"}));
  $("drop").dispatchEvent(new DragEvent("drop", {bubbles: true, dataTransfer: moved}));
"""

TIME = "--virtual-time-budget=20000"
"""Milliseconds that a page is given, as the browser counts them."""

PASTE = '$("text").value = "a fine film"; $("go").click();'


class Site:
    """A server on loopback whose page can be driven by a script, under ``/probe``."""

    def __init__(self, server: Server, steps: str = "") -> None:
        self.steps = steps
        self._answers = server
        self._app = build_app(LocalService(server), hosts=["127.0.0.1"])
        config = uvicorn.Config(self.app, port=0, log_level="error", lifespan="on", interface="asgi3")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/probe":
            await self._app(scope, receive, send)
            return
        page = Path(__file__).parents[2].joinpath("visadapt/serving/web/page.html").read_text(encoding="utf-8")
        body = page.replace("</body>", DRIVE.replace("STEPS", self.steps) + "</body>").encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": body})

    def __enter__(self) -> Site:
        self._thread.start()
        while not (self._server.started and self._answers.ready):
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture
def images(written: Path) -> Iterator[Site]:
    with Site(Server(written), DROP.replace("DATA", base64.b64encode(png(0, (300, 200))).decode())) as site:
        yield site


def told(browser: list[str], url: str, width: int = 1200) -> dict[str, Any]:
    command = [*browser, TIME, f"--window-size={width},900", "--dump-dom", url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", shown, re.DOTALL)
    assert title, shown[-500:]
    found: dict[str, Any] = json.loads(html.unescape(title.group(1)))
    return found


def test_a_dropped_image_is_classified(images: Site, browser: list[str]) -> None:
    found = told(browser, f"{images.url}/probe")
    assert found["error"] == ""
    assert found["tasks"] == ["birds", "cars", "flowers", "maps"]
    assert found["preview"] == 300
    assert sorted(found["labels"]) == sorted(LABELS)
    assert found["shares"] == sorted(found["shares"], reverse=True)
    assert sum(found["shares"]) == pytest.approx(100, abs=0.1)
    assert found["drawn"] == pytest.approx(found["shares"], abs=1.5)


def test_the_page_fits_a_phone(images: Site, browser: list[str]) -> None:
    found = told(browser, f"{images.url}/probe", 390)
    assert len(found["labels"]) == 5
    assert found["overflow"] <= 0


def test_the_real_page_runs_under_its_policy_and_shows_the_tasks(images: Site, browser: list[str]) -> None:
    for path, words in (("/", ("flowers", "4 tasks on backbone")), ("/docs", ("POST /v1/predict", "curl -F"))):
        command = [*browser, TIME, "--dump-dom", images.url + path]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        for word in words:
            assert word in shown, path


def test_a_pasted_text_is_classified(bert: Path, tmp_path: Path, browser: list[str]) -> None:
    write_text_task(tmp_path, bert, "films")
    write_text_task(tmp_path, bert, "twins", 1, pairs=True)
    (tmp_path / "rotten.visadapt").write_bytes(b"no task")
    with Site(Server(tmp_path, backbone=f"hf/{bert}"), PASTE) as site:
        found = told(browser, f"{site.url}/probe")
        assert sorted(found["labels"]) == ["bad", "good"]
        assert (found["tasks"], found["broken"], found["error"]) == (["films", "twins"], ["rotten"], "")
        # a task of pairs takes two
        site.steps = (
            '[...document.querySelectorAll("#tasks button")][1].click(); $("second").value = "another";' + PASTE
        )
        found = told(browser, f"{site.url}/probe")
        assert (sorted(found["labels"]), found["error"]) == (["bad", "good"], "")


HOSTILE = {
    "<img src=x onerror=document.title='no'>": "<img src=x onerror=document.title='no'>",
    "</script><b>&amp;": "</script><b>&amp;",
    "a\x1b[31m\x07": "a\\x1b[31m\\x07",
    "two\nlines\0": "two\\x0alines\\x00",
    "\u202egnp.exe": "\\u202egnp.exe",
    "🚢 Zürich \u2028": "🚢 Zürich \\u2028",
    "x" * 400: "x" * 400,
    "Z\u0301\u0300\u0302" * 40: "Z\u0301\u0300\u0302" * 40,
}
"""Labels, and how they are shown."""


def test_names_and_labels_cannot_act_on_the_page(tmp_path: Path, browser: list[str]) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    model = network()
    visadapt.inject(model, m=4, task="a" * 180, num_classes=len(HOSTILE), labels=tuple(HOSTILE))
    visadapt.save(model, "a" * 180, folder / f"{'a' * 180}.visadapt", notes=NOTES)
    (folder / "<b>x\x1b\u202e.visadapt").write_bytes(b"no task")
    (folder / "place.visadapt").mkdir()
    steps = DROP.replace("DATA", base64.b64encode(png()).decode())
    with Site(Server(folder), steps) as site:
        for width in (1200, 390):
            found = told(browser, f"{site.url}/probe", width)
            assert sorted(found["labels"]) == sorted(HOSTILE.values())
            assert found["broken"] == ["<b>x\\x1b\\u202e", "place"]
            assert (found["tasks"], found["error"]) == (["a" * 180], "")
            # neither a long name nor a long label takes the page's width or height
            assert max(found["overflow"], found["aside"]) <= 0
            assert found["height"] < 100


def test_an_error_is_shown(written: Path, browser: list[str]) -> None:
    steps = DROP.replace("DATA", base64.b64encode(b"no image").decode())
    with Site(Server(written), steps) as site:
        found = told(browser, f"{site.url}/probe")
    assert "not a readable image" in found["error"]
    assert found["labels"] == []


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark(images: Site, browser: list[str], tmp_path: Path, theme: str, width: int) -> None:
    shot = tmp_path / "page.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    command = [*browser, TIME, f"--window-size={width},1000", scheme, f"--screenshot={shot}", f"{images.url}/probe"]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    with Image.open(shot) as image:
        assert image.width == width
        colours = image.convert("RGB").getcolors(1 << 24)
    names = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in colours}
    paper, accent = {"light": ("#fbfbfa", "#1f6f78"), "dark": ("#141618", "#6cc3cc")}[theme]
    assert "#{:02x}{:02x}{:02x}".format(*max(colours)[1]) in (paper, {"light": "#ffffff", "dark": "#1c1f22"}[theme])
    assert {paper, accent} <= names
