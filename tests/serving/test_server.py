"""The server in Python: every answer is what the task alone gives, whatever happens to the files meanwhile."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

import visadapt
from tests.models import stir
from tests.serving.conftest import CLASSES, LABELS, NOTES, alone, network, png, write_task, write_text_task
from visadapt import VisadaptError
from visadapt.serving import Limits, Server, ServingError, forward, pool
from visadapt.serving import server as server_module


def serve(action: Callable[[Server], Awaitable[Any]], *source: Any, max_batch: int = 4, **options: Any) -> Any:
    """Run an action on a server; it warms up with batches of every number of samples up to ``max_batch``."""

    async def main() -> Any:
        async with Server(*source, max_batch=max_batch, **options) as server:
            return await action(server)

    return asyncio.run(main())


def counted(server: Server, name: str) -> float:
    return float(server.metrics.registry.get_sample_value(f"visadapt_{name}") or 0)


async def refused(awaitable: Awaitable[Any]) -> ServingError:
    with pytest.raises(ServingError) as caught:
        await awaitable
    return caught.value


def test_an_exact_answer_is_bit_for_bit_that_of_the_task_alone(folder: Path) -> None:
    async def action(server: Server) -> None:
        found = await asyncio.gather(*(server.predict(name, [png(i) for i in range(3)], top=2) for name in CLASSES))
        for name, answers in zip(CLASSES, found, strict=True):
            for seed, answer in enumerate(answers):
                logits = alone(folder / f"{name}.visadapt", png(seed))
                assert torch.equal(answer.logits, logits)
                best = logits.softmax(-1).topk(2)
                assert answer.labels == tuple(LABELS[i] for i in best.indices.tolist())
                assert answer.scores == tuple(best.values.tolist())

    serve(action, folder, exact=True)


def test_requests_of_several_tasks_share_a_batch(folder: Path) -> None:
    async def action(server: Server) -> None:
        # the warm-up's samples are not counted
        assert counted(server, "latency_seconds_count") == counted(server, "batch_size_count") == 0
        names, files = [name for name in CLASSES for _ in range(4)], [png(seed) for seed in range(16)]
        before = counted(server, "batch_size_count")
        answers = await server.predict(names, files)
        assert counted(server, "batch_size_count") == before + 1
        assert [answer.task for answer in answers] == names
        for name, data, answer in zip(names, files, answers, strict=True):
            torch.testing.assert_close(answer.logits, alone(folder / f"{name}.visadapt", data), rtol=0, atol=1e-5)
        # the same batch in another process: bit for bit the same
        model = network()
        for name in CLASSES:
            visadapt.load(model, folder / f"{name}.visadapt")
        inputs = visadapt.data.inputs.from_description(NOTES["inputs"])
        batch = inputs(inputs.read([Image.open(io.BytesIO(data)) for data in files]))
        with torch.no_grad(), visadapt.using(model, names):
            logits = model(batch)
        assert all(torch.equal(a.logits, row[: len(a.logits)]) for a, row in zip(answers, logits, strict=True))

    serve(action, folder, max_batch=16, max_wait=5.0)


def test_a_batch_of_a_request_waits_for_no_more_than_it_was_told(folder: Path) -> None:
    async def action(server: Server) -> None:
        await asyncio.wait_for(server.predict("flowers", [png()]), 30)

    serve(action, folder, max_wait=0.0)


def test_tasks_follow_their_files(folder: Path, tmp_path: Path) -> None:
    async def action(server: Server) -> None:
        first = (await server.predict("flowers", [png()]))[0]
        os.replace(write_task(tmp_path, "flowers", seed=7), folder / "flowers.visadapt")
        second = (await server.predict("flowers", [png()]))[0]
        assert first.digest != second.digest
        assert torch.equal(second.logits, alone(folder / "flowers.visadapt", png()))
        (folder / "flowers.visadapt").unlink()
        gone = await refused(server.predict("flowers", [png()]))
        assert (gone.name, gone.status) == ("unknown_task", 404)
        write_task(folder, "fruits", seed=3)
        assert torch.equal(
            (await server.predict("fruits", [png()]))[0].logits, alone(folder / "fruits.visadapt", png())
        )
        assert "flowers" not in visadapt.tasks(server.pool.model)
        # touched, but the same: not loaded again
        loads = counted(server, "loads_total")
        os.utime(folder / "fruits.visadapt", (1, 1))
        await server.predict("fruits", [png()])
        assert counted(server, "loads_total") == loads

    serve(action, folder, exact=True)


def test_a_file_that_was_another_while_it_was_loaded_is_loaded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "flowers.visadapt"
    first, other = file.read_bytes(), write_task(tmp_path, "flowers", seed=7).read_bytes()

    def replace(data: bytes) -> None:
        partial = folder / ".part"
        partial.write_bytes(data)
        os.replace(partial, file)

    async def action(server: Server) -> None:
        load, calls = pool.load, []

        def swapped(model: Any, path: Path, **options: Any) -> str:
            calls.append(path)
            if len(calls) == 1:
                # another version for just as long as it is loaded
                replace(other)
            try:
                return load(model, path, **options)
            finally:
                replace(first)

        assert "flowers" not in server.pool.loaded()
        monkeypatch.setattr(pool, "load", swapped)
        answer = (await server.predict("flowers", [png()]))[0]
        assert len(calls) == 2
        assert torch.equal(answer.logits, alone(file, png()))

    serve(action, folder, exact=True)


def test_a_task_that_is_replaced_by_one_with_other_inputs_prepares_anew(folder: Path) -> None:
    async def action(server: Server) -> None:
        model = network()
        name = visadapt.load(model, folder / "flowers.visadapt")
        notes = {"inputs": {"kind": "images", "size": 64}}
        gate = threading.Event()
        ensure = server.pool.ensure

        def held(*arguments: Any) -> Any:
            gate.wait(30)
            return ensure(*arguments)

        server.pool.ensure = held  # type: ignore[method-assign]
        request = asyncio.create_task(server.predict("flowers", [png()]))
        while not server._worker._batch:
            await asyncio.sleep(0.01)
        visadapt.save(model, name, folder / "flowers.visadapt", notes=notes)
        gate.set()
        assert torch.equal((await request)[0].logits, alone(folder / "flowers.visadapt", png()))

    serve(action, folder, exact=True)


def test_at_most_so_many_tasks_are_in_memory(folder: Path) -> None:
    async def action(server: Server) -> None:
        random = Random(0)
        for _ in range(12):
            name = random.choice(list(CLASSES))
            answer = (await server.predict(name, [png(1)]))[0]
            assert torch.equal(answer.logits, alone(folder / f"{name}.visadapt", png(1)))
            assert len(visadapt.tasks(server.pool.model)) <= 2
            assert name in server.pool.loaded()
        assert counted(server, "evictions_total") > 0
        # more tasks in one request than may be in memory
        answers = await server.predict(list(CLASSES), [png(1)])
        for answer in answers:
            assert torch.equal(answer.logits, alone(folder / f"{answer.task}.visadapt", png(1)))

    serve(action, folder, exact=True, max_tasks=2)


def test_a_broken_file_harms_nobody_else(folder: Path) -> None:
    data = (folder / "birds.visadapt").read_bytes()
    (folder / "birds.visadapt").write_bytes(data[:-7] + b"changed")
    (folder / "not a name.visadapt").write_bytes((folder / "cars.visadapt").read_bytes())
    other = visadapt.inject("timm/resnet18", m=2, task="other", num_classes=2, pretrained=False)
    visadapt.save(other, "other", folder / "other.visadapt", notes=NOTES)

    async def action(server: Server) -> None:
        states = dict(server.entries())
        assert sorted(states) == ["birds", "cars", "flowers", "maps", "not a name", "other"]
        broken = {name: str(state) for name, state in states.items() if isinstance(state, ServingError)}
        assert "its digest does not match" in broken["birds"]
        # clients are not told where the server has its files
        assert not [error for error in broken.values() if str(folder.parent) in error]
        assert "made of letters, digits" in broken["not a name"]
        errors = await asyncio.gather(*(refused(server.predict(name, [png()])) for name in ("birds", "other")))
        assert [error.name for error in errors] == ["broken_task", "broken_task"]
        assert str(errors[1]).startswith("other.visadapt was trained on another backbone")
        # in one batch with the others
        found = await asyncio.gather(
            *(server.predict(name, [png()]) for name in ("flowers", "birds", "cars", "other")), return_exceptions=True
        )
        assert [isinstance(each, ServingError) for each in found] == [False, True, False, True]
        (folder / "birds.visadapt").write_bytes(data)
        assert torch.equal((await server.predict("birds", [png()]))[0].logits, alone(folder / "birds.visadapt", png()))

    serve(action, folder, exact=True)


@pytest.mark.parametrize(
    ("task", "inputs", "top", "name", "message"),
    [
        ("flower", [b""], 1, "unknown_task", "did you mean 'flowers'"),
        ("../flowers", [b""], 1, "unknown_task", "no task '../flowers'"),
        ("flowers\0", [b""], 1, "unknown_task", "no task"),
        ("", [b""], 1, "unknown_task", "no task ''"),
        ("flowers", [b"\x89PNG"], 1, "undecodable", "not a readable image"),
        ("flowers", [png()[:60]], 1, "undecodable", "not a readable image"),
        ("flowers", ["a text"], 1, "wrong_input", "must be of kind image, got text"),
        ("flowers", [("a", "b")], 1, "wrong_input", "must be of kind image, got pair of texts"),
        ("flowers", [3.5], 1, "invalid_request", "must be an image or a text, got float"),
        ("flowers", [torch.zeros(3, 4, 4)], 1, "invalid_request", "must be uint8"),
        ("flowers", [torch.zeros(3, 99, 99, dtype=torch.uint8)], 1, "too_large", "more than 5,000 pixels"),
        ("flowers", [png(size=(99, 99))], 1, "too_large", "more than 5,000 pixels"),
        ("flowers", [b"0" * 50_001], 1, "too_large", "more than 50,000 bytes"),
        ("flowers", ["x" * 41], 1, "too_large", "more than 40 characters"),
        ("flowers", [b""] * 9, 1, "too_large", "more than 8 inputs, got 9"),
        ("flowers", [], 1, "invalid_request", "at least one input"),
        ("flowers", "text", 1, "invalid_request", "must be a list"),
        ("flowers", [png()], 0, "invalid_request", "top must be"),
        ("flowers", [png()], True, "invalid_request", "top must be"),
        (["flowers", "birds"], [b""] * 3, 1, "invalid_request", "one task per input, got 2 for 3"),
        ([], [b""], 1, "invalid_request", "a name or a list of names"),
        (["flowers", 3], [b"", b""], 1, "invalid_request", "a name or a list of names"),
        ("auto", [png()], 1, "invalid_request", "needs a decider"),
    ],
)
def test_what_cannot_be_answered(
    written: Path, task: Any, inputs: Any, top: Any, name: str, message: str, started: Server
) -> None:
    error = asyncio.run(refused(started.predict(task, inputs, top=top)))
    assert error.name == name
    assert message in str(error)
    assert error.remedy
    assert error.status < 500


@pytest.fixture(scope="module")
def started(written: Path) -> Iterator[Server]:
    limits = Limits(image=50_000, pixels=5_000, text=40, inputs=8)
    server = Server(written, limits=limits, max_batch=4).start()
    yield server
    assert server.stop(30)


def test_a_full_queue_refuses_and_says_when_to_come_back(folder: Path) -> None:
    async def action(server: Server) -> None:
        gate, answer = threading.Event(), server._forward.answer
        server._forward.answer = lambda items: (gate.wait(30), answer(items))[1]  # type: ignore[method-assign]
        first = asyncio.create_task(server.predict("flowers", [png()]))
        while not server._worker._batch:
            await asyncio.sleep(0.01)
        second = [asyncio.create_task(server.predict("birds", [png(), png(1)])) for _ in range(2)]
        while len(server._queue) < 4:
            await asyncio.sleep(0.01)
        error = await refused(server.predict("flowers", [png()]))
        assert (error.name, error.status) == ("overloaded", 503)
        assert error.retry_after is not None
        assert error.retry_after >= 1
        # the client of one is gone: it is not computed
        second[0].cancel()
        await asyncio.sleep(0.05)
        gate.set()
        assert (await first)[0].task == "flowers"
        assert len(await second[1]) == 2

    serve(action, folder, limits=Limits(queue=4), max_batch=1, max_wait=0.0)


def test_what_has_no_room_is_refused_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def action(server: Server) -> None:
        gate, decoded, make = threading.Event(), [], server._items

        def slow(names: list[str], inputs: list[Any]) -> Any:
            gate.wait(30)
            decoded.append(names)
            return make(names, inputs)

        monkeypatch.setattr(server, "_items", slow)
        requests = [asyncio.create_task(server.predict("birds", [png()] * 2)) for _ in range(3)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        # the third, at once; a client that is gone makes room for another
        assert (await refused(requests[2])).name == "overloaded"
        requests[0].cancel()
        await asyncio.wait([requests[0]])
        requests[2] = asyncio.create_task(server.predict("birds", [png()]))
        await asyncio.sleep(0)
        gate.set()
        assert [len(await request) for request in requests[1:]] == [2, 1]
        # one that can never have room is not told to come again
        assert (await refused(server.predict("birds", [png()] * 5))).name == "too_large"

    serve(action, folder, limits=Limits(queue=4))


def test_a_task_whose_inputs_cannot_be_prepared_does_not_keep_the_others_from_starting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(entry: Any, *others: Any) -> Any:
        if entry.name == "birds":
            raise ServingError("undecodable", "no tokenizer", "install it")
        return kept(entry, *others)

    kept = forward.prepare
    for module in (forward, server_module):
        monkeypatch.setattr(module, "prepare", fails)

    async def action(server: Server) -> None:
        assert (await refused(server.predict("birds", [png()]))).name == "undecodable"
        assert (await server.predict("maps", [png()]))[0].task == "maps"

    serve(action, folder)


def test_what_waits_when_the_server_stops_is_answered(folder: Path) -> None:
    async def main() -> None:
        server = Server(folder, max_batch=16, max_wait=60.0).start()
        requests = [asyncio.create_task(server.predict(name, [png()])) for name in CLASSES]
        while len(server._queue) < 4:
            await asyncio.sleep(0.01)
        assert await asyncio.get_running_loop().run_in_executor(None, server.stop)
        assert [(await request)[0].task for request in requests] == list(CLASSES)
        assert (await refused(server.predict("flowers", [png()]))).name == "not_ready"

    asyncio.run(main())


def test_a_worker_that_crashes_is_replaced(folder: Path) -> None:
    async def action(server: Server) -> None:
        run = server._forward._logits

        def crash(batch: Any) -> Any:
            server._forward._logits = run  # type: ignore[method-assign]
            raise SystemExit("out of luck")

        server._forward._logits = crash  # type: ignore[method-assign]
        error = await refused(server.predict("flowers", [png()]))
        assert (error.name, error.status) == ("failed", 500)
        assert "the worker crashed: SystemExit: out of luck" in str(error)
        answer = (await server.predict("flowers", [png()]))[0]
        assert torch.equal(answer.logits, alone(folder / "flowers.visadapt", png()))
        assert counted(server, "worker_restarts_total") == 1

    serve(action, folder, exact=True)


def test_a_sample_on_which_the_model_fails_does_not_harm_its_batch(folder: Path) -> None:
    model = network()
    visadapt.load(model, folder / "cars.visadapt")
    with torch.no_grad():
        next(iter(visadapt.parameters(model, "cars"))).fill_(float("nan"))
    visadapt.save(model, "cars", folder / "cars.visadapt")

    async def action(server: Server) -> None:
        found = await asyncio.gather(*(server.predict(name, [png()]) for name in CLASSES), return_exceptions=True)
        assert [str(each) for each in found if isinstance(each, BaseException)] == [
            "task 'cars' gives NaN or infinite logits for this input"
        ]
        run = server._forward._logits

        def fails(batch: Any) -> Any:
            if any(item.task == "birds" for item in batch):
                raise RuntimeError("no memory")
            return run(batch)

        server._forward._logits = fails  # type: ignore[method-assign]
        found = await asyncio.gather(
            *(server.predict(name, [png()]) for name in ("flowers", "birds", "maps")), return_exceptions=True
        )
        assert "failed on this input: RuntimeError: no memory" in str(found[1])
        assert [each[0].task for each in (found[0], found[2])] == ["flowers", "maps"]

    serve(action, folder, max_wait=0.5, max_batch=4)


def test_texts_of_several_lengths_share_a_batch(bert: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("news", "mail")):
        write_text_task(tmp_path, bert, name, seed)
    write_text_task(tmp_path, bert, "twins", 2, pairs=True)
    texts = ["short", "a text that is rather longer than the other one", "word " * 60]

    async def action(server: Server) -> None:
        both = await asyncio.gather(server.predict("news", texts), server.predict("mail", texts),
                                    server.predict("twins", [("one", "another"), "one\tanother"]))  # fmt: skip
        assert counted(server, "batch_size_sum") - warm == 8
        for name, answers in zip(("news", "mail"), both, strict=False):
            for text, answer in zip(texts, answers, strict=True):
                single = (await server.predict(name, [text]))[0]
                torch.testing.assert_close(answer.logits, single.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(both[2][0].logits, both[2][1].logits, rtol=0, atol=1e-5)
        assert (await refused(server.predict("twins", ["one text"]))).name == "wrong_input"
        assert (await refused(server.predict("news", [png()]))).name == "wrong_input"
        assert (await refused(server.predict("news", ["\ud800"]))).name == "undecodable"

    warm = 0.0

    async def measured(server: Server) -> None:
        nonlocal warm
        warm = counted(server, "batch_size_sum")
        await action(server)

    serve(measured, tmp_path, backbone=f"hf/{bert}", max_wait=0.5, max_batch=8)


def test_the_decider_chooses(folder: Path, tmp_path: Path) -> None:
    model = network()
    for name in ("flowers", "birds"):
        visadapt.load(model, folder / f"{name}.visadapt")
    inputs = visadapt.data.inputs.from_description(NOTES["inputs"])
    dark, bright = (
        [torch.randint(low, low + 60, (3, 32, 32), dtype=torch.uint8) for _ in range(12)] for low in (0, 190)
    )
    visadapt.fit_decider(model, {"flowers": [inputs(torch.stack(dark))], "birds": [inputs(torch.stack(bright))]})
    visadapt.save_decider(model, tmp_path / "decider.safetensors")
    expected = visadapt.decide(model, inputs(torch.stack([dark[0], bright[0], dark[1]])))
    assert expected == ["flowers", "birds", "flowers"]

    async def action(server: Server) -> None:
        answers = await server.predict("auto", [dark[0], bright[0], dark[1]])
        assert [answer.task for answer in answers] == expected
        (folder / "birds.visadapt").unlink()
        assert (await refused(server.predict("auto", [bright[0]]))).name == "unknown_task"
        # that another task is gone, if it is the decider's first, is nothing to the rest
        (folder / "birds.visadapt").write_bytes(birds)
        (folder / "flowers.visadapt").unlink()
        assert [answer.task for answer in await server.predict("auto", [bright[0]])] == ["birds"]

    birds, flowers = ((folder / f"{name}.visadapt").read_bytes() for name in ("birds", "flowers"))
    for exact in (False, True):
        serve(action, folder, decider=tmp_path / "decider.safetensors", exact=exact)
        (folder / "flowers.visadapt").write_bytes(flowers)


def test_a_model_in_memory_is_served_too() -> None:
    model = network()
    for seed, name in enumerate(("a", "b")):
        visadapt.inject(model, m=2, task=name, num_classes=2 + seed)
        stir(model, name, seed)

    async def action(server: Server) -> None:
        answers = await server.predict(["a", "b"], [png()])
        assert [len(answer.logits) for answer in answers] == [2, 3]
        assert answers[0].labels[0] in ("0", "1")
        error = await refused(server.predict("c", [png()]))
        assert (error.name, "there is: a, b" in str(error)) == ("unknown_task", True)
        assert not any(module.training for module in model.modules())

    modes = []
    for wanted in (True, False):
        model.train(wanted)
        model.layer1.train(not wanted)
        modes.append([module.training for module in model.modules()])
        serve(action, model)
        assert [module.training for module in model.modules()] == modes[-1]
    assert modes[0] != modes[1]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "at least one task file"),
        ("nowhere", {}, "no file or folder nowhere"),
        (".", {}, "no task file: name the backbone"),
        (".", {"max_batch": 0}, "max_batch must be a positive integer"),
        (".", {"max_tasks": "2"}, "max_tasks must be an integer, got '2'"),
        (".", {"max_wait": -1}, "max_wait must be"),
    ],
)
def test_what_no_server_can_be_made_of(
    source: Any, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VisadaptError, match=message):
        Server(source, **options)


def test_single_files_and_folders(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_task(other, "flowers", 5)

    async def action(server: Server) -> None:
        states = dict(server.entries())
        assert "there is a file flowers.visadapt in" in str(states["flowers"])
        assert (await server.predict("cars", [png()]))[0].task == "cars"

    serve(action, [folder, other])
    with pytest.raises(VisadaptError, match="have the same name"):
        Server([folder / "flowers.visadapt", other / "flowers.visadapt"])

    async def single(server: Server) -> None:
        assert [name for name, _ in server.entries()] == ["flowers"]

    serve(single, other / "flowers.visadapt")
