"""What is no file, or is mostly holes, is refused by every reader and writer; none waits, and none takes the memory."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import visadapt
from tests.models import ZOO
from tests.test_described_sizes import little_memory
from visadapt import VisadaptError, data
from visadapt.cli.options import check_writable
from visadapt.data.datasets_library import open_dataset
from visadapt.data.hub import resolve
from visadapt.data.processors import processor_of
from visadapt.experiments import read_results, write_csv
from visadapt.frozen.cache_file import CacheFile
from visadapt.reading import opened, other_kind, read_whole
from visadapt.runtime.decider import read_decider
from visadapt.serving.running import Options
from visadapt.tensor_file import read_described
from visadapt.training import Recipe, fit


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(path.parent, os.O_RDONLY)
        try:  # the name of a socket is short
            listening.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def _holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": _pipe,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "holes": _holes,
    "a file of the system": lambda path: path.symlink_to("/proc/self/mem"),
}


def _trained(path: Path) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="a", num_classes=2)
    images = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    fit(model, "a", images, recipe=Recipe(epochs=1, batch_size=2), checkpoint=path, progress=False)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "task": ("a.visadapt", lambda path: visadapt.load(torch.nn.Linear(2, 2), path)),
    "decider": ("decider", lambda path: read_decider(torch.nn.Linear(2, 2), path)),
    "described": ("file", lambda path: read_described(path, "visadapt", "task file")),
    "table": ("a.csv", data.read_texts),
    "packed table": ("a.csv.gz", data.read_texts),
    "texts": ("a.tsv", data.load_text),
    "table of images": ("a.csv", data.load_images),
    "image": ("a.png", lambda path: data.read_images([path], size=8)),
    "weights": ("a.safetensors", data.dequantise),
    "result": ("a.json", read_results),
    "results": ("a.csv", read_results),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, reader: str) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    KINDS[kind](path)
    begun = time.process_time()
    with little_memory():
        if kind == "folder" and reader in ("result", "results"):
            assert read(path) == []
        else:
            with pytest.raises(VisadaptError, match=r"a\.|decider|file") as caught:
                read(path)
            expected = kind if kind in ("pipe", "socket", "device") else ""
            assert expected in str(caught.value)
            assert "did you mean" not in str(caught.value) or kind == "link to nothing"
    assert time.process_time() - begun < 2


LIBRARIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tokenizer": ("tokenizer.json", lambda folder: data.tokenizer_of(f"hf/{folder}")),
    "model": ("config.json", lambda folder: resolve(f"hf/{folder}")),
    "model of timm": ("model.safetensors", lambda folder: resolve(f"timm/local-dir:{folder}")),
    "processor": ("preprocessor_config.json", lambda folder: processor_of(f"hf/{folder}")),
    "folder of datasets": ("train.json", lambda folder: open_dataset(folder, "data")),
    "file of datasets": ("train.json", lambda folder: open_dataset(folder / "train.json", "data")),
    "stored by datasets": ("state.json", lambda folder: open_dataset(folder, "data")),
    "token": ("token", lambda folder: Options(("a",), token_file=str(folder / "token")).token()),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "holes"])
def test_what_is_no_file_is_kept_from_libraries_that_read_files_themselves(
    tmp_path: Path, kind: str, library: str
) -> None:
    name, read = LIBRARIES[library]
    KINDS[kind](tmp_path / name)
    with pytest.raises(VisadaptError, match=name) as caught:
        read(tmp_path)
    assert ("bytes per byte" if kind == "holes" else kind) in str(caught.value) or library == "token"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "holes", "a file of the system"])
def test_a_folder_of_results_is_read_without_what_is_no_file(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "a.json")
    if other_kind(tmp_path / "a.json"):
        assert read_results(tmp_path) == []
    else:
        with pytest.raises(VisadaptError, match=r"a\.json is not a result"):
            read_results(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "a link to itself", "holes"])
@pytest.mark.parametrize("name", ["features", "features.key", "features.partial", "features.key.partial"])
def test_a_cache_is_never_of_what_is_no_file(tmp_path: Path, kind: str, name: str) -> None:
    file = CacheFile(tmp_path / "features", (4, 8), torch.float32)
    with file.writing() as writer:
        writer.write([torch.ones(4, 8)], lambda: {"of": "this"})
    (tmp_path / name).unlink(missing_ok=True)
    KINDS[kind](tmp_path / name)
    with little_memory():
        if not name.endswith("partial"):
            assert file.read({"of": "this"}) is None
        refused = name == "features.partial" and kind != "holes"
        with pytest.raises(VisadaptError, match="cannot keep") if refused else nullcontext(), file.writing() as writer:
            writer.write([torch.zeros(4, 8)], lambda: {"of": "that"})
        found = file.read({"of": "this" if refused else "that"})
        assert found is not None
        assert bool(found.any()) is refused


def test_a_link_does_not_choose_the_file_that_a_cache_cuts_off(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "features.partial").symlink_to(tmp_path / "mine")
    file = CacheFile(tmp_path / "features", (1,), torch.int8)
    with pytest.raises(VisadaptError, match="cannot keep"), file.writing():
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.csv"
    KINDS[kind](path)
    for call in (lambda: write_csv([], path), lambda: check_writable(path, force=True), lambda: _trained(path)):
        with pytest.raises(VisadaptError, match=f"must be a file, got (a|the) {kind}"):
            call()
    assert other_kind(path) == kind
    assert os.listdir(tmp_path) == ["a.csv"]


def test_holes_that_take_no_more_than_other_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    with file.open("wb") as written:
        written.truncate(1000)
    assert read_whole(file) == bytes(1000)
    with file.open("r+b") as written:
        written.truncate(20_000_000)
        written.seek(10_000_000)
        written.write(b"x" * 300_000)
    with opened(file) as read:
        assert read.tell() == 0
    with file.open("r+b") as written:
        written.truncate(60_000_000)
    with pytest.raises(VisadaptError, match="a has more than 100 bytes per byte on the disk"):
        opened(file)
    monkeypatch.setenv("VISADAPT_MAX_UNPACKED_RATIO", "300")
    opened(file).close()


def test_a_name_that_no_file_can_have_is_refused() -> None:
    for read in (read_whole, lambda name: data.read_texts(Path(f"{name}.csv"))):
        with pytest.raises(VisadaptError, match="cannot read"):
            read("a\0b")


def test_a_file_that_grows_is_not_read(tmp_path: Path) -> None:
    file, done = tmp_path / "a.csv", threading.Event()
    file.write_text("text\n" * 1000)

    def grow() -> None:
        with file.open("a") as growing:
            while not done.is_set():
                growing.write("text\n" * 1000)
                growing.flush()

    thread = threading.Thread(target=grow)
    thread.start()

    def read() -> None:
        while file.stat().st_size < 100_000_000:
            read_whole(file)

    try:
        with pytest.raises(VisadaptError, match="it was written to meanwhile"):
            read()
    finally:
        done.set()
        thread.join()


def test_only_the_header_is_read_of_a_file_of_another_kind(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    # what follows is missing, and is not asked for
    (tmp_path / "model.safetensors").write_bytes(data[:-16])
    with pytest.raises(VisadaptError, match="is not a task file: its header has no description"):
        read_described(tmp_path / "model.safetensors", "visadapt", "task file")
