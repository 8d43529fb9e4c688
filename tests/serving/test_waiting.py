"""How long samples wait for others, and what is established before the first of them comes."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import CLASSES, png, write_text_task
from visadapt.backbone import known_batches
from visadapt.serving import Server
from visadapt.serving.heap import trim_heap
from visadapt.serving.samples import Sample
from visadapt.serving.waiting import Item, WaitingQueue

WAIT = 0.4


def resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


def test_freed_memory_is_returned_to_the_system() -> None:
    blocks = [bytearray(b"1") * 50_000 for _ in range(4000)]
    kept, before = blocks[::40], resident()
    del blocks
    if trim_heap():
        # what is free between blocks that are in use
        assert resident() < before - 100
    assert len(kept) == 100


def items(count: int) -> list[Item]:
    return [Item("a", Sample("text", "a")) for _ in range(count)]


def taken(queue: WaitingQueue, later: int = 0) -> tuple[int, float]:
    """Size of the next batch, and the seconds until it is taken; some items come a little later."""
    timer = threading.Timer(WAIT / 8, queue.put, [items(later)])
    start = time.monotonic()
    if later:
        timer.start()
    size = len(queue.take())
    seconds = time.monotonic() - start
    timer.cancel()
    return size, seconds


def test_an_idle_worker_does_not_wait() -> None:
    queue = WaitingQueue(99, 8, WAIT)
    queue.note(8, 0.1)
    time.sleep(1.1 * WAIT)
    queue.put(items(1))
    size, seconds = taken(queue)
    assert size == 1
    assert seconds < WAIT / 2


def test_just_after_a_batch_its_clients_are_waited_for() -> None:
    queue = WaitingQueue(99, 8, WAIT)
    queue.note(3, 0.1)
    queue.put(items(1))
    size, seconds = taken(queue, later=2)
    assert size == 3
    assert seconds < WAIT * 0.9
    # but for no longer than it was told, nor for more than a batch
    queue.note(3, 0.1)
    queue.put(items(1))
    size, seconds = taken(queue)
    assert size == 1
    assert WAIT * 0.9 < seconds < 3 * WAIT
    queue.note(8, 0.1)
    queue.put(items(11))
    assert taken(queue)[0] == 8


def test_what_waited_during_a_batch_is_taken_at_once() -> None:
    queue = WaitingQueue(99, 8, WAIT)
    queue.put(items(2))
    time.sleep(1.1 * WAIT)
    queue.note(8, WAIT)
    assert taken(queue)[1] < WAIT / 2


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches whose rows had to be established by forwards of their own."""
    found: list[int] = []
    examine = known_batches.examine

    def counted(model: Any, given: Any, samples: int, *others: Any) -> Any:
        found.append(samples)
        return examine(model, given, samples, *others)

    monkeypatch.setattr(known_batches, "examine", counted)
    return found


def test_no_request_of_images_has_to_establish_whose_rows_are_whose(folder: Path, examined: list[int]) -> None:
    async def main() -> None:
        async with Server(folder, max_batch=32, max_wait=0.0) as server:
            examined.clear()
            names = list(CLASSES)
            # as many as channels (3) and as pixels (32) among them
            for count in (1, 2, 3, 5, 8, 32):
                await server.predict([names[i % 4] for i in range(count)], [png(i) for i in range(count)])

    asyncio.run(main())
    assert examined == []


def test_no_request_of_texts_has_to_establish_whose_rows_are_whose(
    bert: Path, tmp_path: Path, examined: list[int]
) -> None:
    for seed, name in enumerate("ab"):
        write_text_task(tmp_path, bert, name, seed)

    async def main() -> None:
        async with Server(tmp_path, backbone=f"hf/{bert}", max_batch=16, max_wait=0.0) as server:
            examined.clear()
            for count in (2, 3, 8, 16):
                # with the two tokens around them, 3 to 16 tokens: as many as samples in some of the batches
                for words in (1, 6, 14):
                    texts = [" ".join(["word"] * (words - i % 2 * (words > 1))) for i in range(count)]
                    await server.predict(["ab"[i % 2] for i in range(count)], texts)

    asyncio.run(main())
    assert examined == []
