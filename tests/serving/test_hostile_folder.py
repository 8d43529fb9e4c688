"""What may lie in a folder of tasks, and happen to it, beside whole task files: it is reported, and harms no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import write_task
from visadapt.data.inputs import ImageInputs
from visadapt.serving import catalogue as module
from visadapt.serving.catalogue import Catalogue, Entry
from visadapt.serving.refusal import ServingError


def opened(folder: Path) -> Catalogue:
    return Catalogue([folder], lambda task, notes: ImageInputs(32))


def reason(catalogue: Catalogue, name: str) -> str:
    state = catalogue.state(name)
    assert isinstance(state, ServingError), state
    return f"{state.name}: {state}"


def test_what_is_not_a_file_is_reported(folder: Path) -> None:
    (folder / "place.visadapt").mkdir()
    os.mkfifo(folder / "pipe.visadapt")
    (folder / "gone.visadapt").symlink_to(folder / "nowhere")
    (folder / "loop.visadapt").symlink_to(folder / "loop.visadapt")
    (folder / "device.visadapt").symlink_to("/dev/zero")
    found = dict(opened(folder).entries())
    said = {name: f"{state.name}: {state}" for name, state in found.items() if isinstance(state, ServingError)}
    assert said == {
        "place": "broken_task: place.visadapt must be a file, got a folder",
        "pipe": "broken_task: pipe.visadapt must be a file, got a device, pipe or socket",
        "device": "broken_task: device.visadapt must be a file, got a device, pipe or socket",
        "gone": "broken_task: cannot read gone.visadapt: it links to no file",
        "loop": "broken_task: cannot read loop.visadapt: it links to no file",
    }
    assert sum(isinstance(state, Entry) for state in found.values()) == 4


def test_a_file_that_becomes_a_folder_and_a_file_again(folder: Path, tmp_path: Path) -> None:
    tasks, file = opened(folder), folder / "birds.visadapt"
    first = tasks.entry("birds").digest
    os.rename(file, tmp_path / "kept")
    file.mkdir()
    assert "got a folder" in reason(tasks, "birds")
    file.rmdir()
    assert reason(tasks, "birds").startswith("unknown_task")
    os.rename(tmp_path / "kept", file)
    assert tasks.entry("birds").digest == first


def test_a_link_is_followed_to_what_it_links_to_now(folder: Path, tmp_path: Path) -> None:
    # as Kubernetes replaces the files of a volume
    old, new = (write_task(tmp_path, name, seed) for seed, name in ((1, "old"), (2, "new")))
    link = folder / "linked.visadapt"
    link.symlink_to(old)
    tasks = opened(folder)
    first = tasks.entry("linked").digest
    (folder / "other").symlink_to(new)
    os.replace(folder / "other", link)
    assert tasks.entry("linked").digest != first


def test_a_file_that_was_copied_with_its_times_is_read_again(folder: Path) -> None:
    file, tasks = folder / "birds.visadapt", opened(folder)
    assert tasks.entry("birds").name == "birds"
    data, times = file.read_bytes(), file.stat()
    with file.open("r+b") as content:  # in place: the same inode, size and time of change
        content.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "digest does not match" in reason(tasks, "birds")


def test_a_clock_that_goes_backwards(folder: Path, tmp_path: Path) -> None:
    tasks, file = opened(folder), folder / "birds.visadapt"
    first = tasks.entry("birds").digest
    newer = write_task(tmp_path, "birds", seed=9)
    os.utime(newer, (1, 1))
    os.replace(newer, file)
    assert tasks.entry("birds").digest != first


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "I/O error")])
def test_an_error_that_passes_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    tasks = opened(folder)

    def fails(*_: Any) -> int:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        said = reason(tasks, "birds")
    assert str(error.strerror) in said
    assert tasks.entry("birds").name == "birds"


def test_a_broken_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bad.visadapt").write_bytes(b"no task")
    tasks, reads = opened(folder), []

    def counted(path: Path) -> Any:
        reads.append(path)
        return read(path)

    read = module.read
    monkeypatch.setattr(module, "read", counted)
    assert [reason(tasks, "bad") for _ in range(3)] == [reason(tasks, "bad")] * 3
    assert len(reads) == 1


NAMES = ("x" * 300, "x" * 10_000_000, "bïrds", "../birds", "birds\0", "a/b", "", "\u202ebirds")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_no_name_is_more_than_unknown(folder: Path, name: str) -> None:
    said = reason(opened(folder), name)
    assert said.startswith("unknown_task: no task ")
    assert len(said) < 500


def test_what_is_known_of_files_that_are_gone_is_forgotten(folder: Path) -> None:
    tasks = opened(folder)
    assert len(dict(tasks.entries())) == len(tasks._known) == 4
    (folder / "birds.visadapt").unlink()
    assert len(dict(tasks.entries())) == len(tasks._known) == 3
