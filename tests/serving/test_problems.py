"""Tasks of every problem are answered as `visadapt.predict` answers them, in Python and over HTTP."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
import visadapt
from tests.models import stir
from tests.serving.conftest import LABELS, NOTES, network, png
from tests.serving.test_http import encoded, predict
from visadapt.opening.predicting import PROBLEMS
from visadapt.serving import Limits, Server, ServingError
from visadapt.serving.preparing import prepare
from visadapt.serving.samples import accept

IMAGES = [png(seed, (50, 40)) for seed in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("problems"), network()
    for seed, problem in enumerate(PROBLEMS):
        torch.manual_seed(seed)
        visadapt.inject(model, m=4, task=problem, num_classes=4, labels=LABELS[:4])
        stir(model, problem, seed)
        visadapt.save(model, problem, folder / f"{problem}.visadapt", notes={**NOTES, "problem_type": problem})
    visadapt.save(model, problem, folder / "odd.visadapt", notes={**NOTES, "problem_type": "ranking"})
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, exact=True).start()
    yield server
    server.stop(30)


def expected(folder: Path, task: str, top: int | None) -> list[list[dict[str, Any]]]:
    model = visadapt.open(folder / f"{task}.visadapt")
    found = [
        visadapt.predict(model, [Image.open(io.BytesIO(data))], task, top=top)[0]
        for data in IMAGES
    ]  # fmt: skip
    name = "value" if task == "regression" else "score"
    return [
        [
            {"label": label, name: number}
            for label, number in zip(each.labels, each.values or each.probabilities, strict=True)
        ]
        for each in found
    ]


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("task", PROBLEMS)
def test_a_task_answers_as_predict_does(server: Server, folder: Path, task: str, top: int | None) -> None:
    body = {"task": task, "inputs": [encoded(data) for data in IMAGES]}
    found = predict(server, body if top is None else {**body, "top": top})
    assert found.status_code == 200, found.text
    answers = found.json()["predictions"]
    assert answers == expected(folder, task, top)
    if task == "multi_label_classification" and top is None:
        # as many labels as are likely enough, which may be none
        assert {len(each) for each in answers} != {1}
    if task == "regression":
        assert [each["label"] for each in answers[0]] == list(LABELS[:4])
        assert any(each["value"] < 0 for each in answers[0])


def test_tasks_of_several_problems_share_a_batch(folder: Path) -> None:
    async def main() -> None:
        async with Server(folder, max_batch=8) as server:
            answers = await server.predict([*PROBLEMS], [IMAGES[0]], top=4)
            for task, answer in zip(PROBLEMS, answers, strict=True):
                (alone,) = expected(folder, task, 4)[:1]
                numbers = [next(v for k, v in each.items() if k != "label") for each in alone]
                assert list(answer.labels) == [each["label"] for each in alone]
                assert list(answer.values or answer.scores) == pytest.approx(numbers, abs=1e-5)
                assert bool(answer.values) == (task == "regression")

    asyncio.run(main())


def test_the_list_of_tasks_says_what_their_outputs_are(server: Server) -> None:
    states = dict(server.entries())
    for problem in PROBLEMS:
        assert states[problem].json()["problem_type"] == problem
    assert "problem_type must be one of single_label_classification" in str(states["odd"])


def test_a_model_in_memory_answers_by_its_notes() -> None:
    model = visadapt.inject(network(), m=2, task="age", num_classes=1)
    visadapt.tasks(model)["age"].notes["problem_type"] = "regression"

    async def main() -> None:
        async with Server(model, max_batch=4) as server:
            (answer,) = await server.predict("age", [png()])
            assert answer.values == tuple(answer.logits.tolist())
            assert (answer.labels, answer.scores) == (("0",), ())

    asyncio.run(main())


def test_the_inputs_are_those_of_preprocess(server: Server, folder: Path) -> None:
    model = visadapt.open(folder / "regression.visadapt")
    sample = accept(IMAGES[0], Limits())
    ours = prepare(server.pool.entry("regression"), sample, Limits())
    assert torch.equal(ours, visadapt.preprocess(model)([Image.open(io.BytesIO(IMAGES[0]))]))


def encoded_image(size: tuple[int, int], mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encoded_image((3000, 2000)), "more than 5,000,000 pixels"),
        # few pixels, but many once its shorter side is resized to 32
        (encoded_image((1, 20_000)), "more than 5,000,000 pixels"),
        (Image.new("L", (3000, 2000)), "more than 5,000,000 pixels"),
    ],
    ids=["large", "long and narrow", "of Pillow"],
)
def test_pixels_are_bounded_before_they_take_memory(folder: Path, image: Any, message: str, monkeypatch: Any) -> None:
    # nothing may be decoded, or resized
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    if isinstance(image, bytes) and b"\x00\x00\x0b\xb8" in image[:32]:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))

    async def main() -> ServingError:
        server = Server(folder, limits=Limits(pixels=5_000_000), max_batch=16)
        server.ready = True  # no warm-up, which resizes
        with pytest.raises(ServingError) as caught:
            await server.predict("regression", [image])
        return caught.value

    error = asyncio.run(main())
    assert (error.name, error.status) == ("too_large", 413)
    assert message in str(error)


def test_a_request_holds_one_decoded_image_at_a_time(folder: Path) -> None:
    """Sixteen images of 4 million pixels in one request take less than two of them decoded."""
    data = encoded_image((2000, 2000), "RGB")

    async def main() -> int:
        async with Server(folder, max_batch=16) as server:
            await server.predict("regression", [data])
            process = Path("/proc/self/clear_refs")
            process.write_text("5", encoding="utf-8")
            before = status("VmRSS")
            await server.predict("regression", [data] * 16)
            return status("VmHWM") - before

    assert asyncio.run(main()) < 2 * 2 * 3 * 2000 * 2000


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
