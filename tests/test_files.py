"""Files are replaced whole or not at all, keep their permissions, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from pathlib import Path

import pytest

import visadapt
from tests.models import ZOO
from visadapt import VisadaptError
from visadapt.files import replacing
from visadapt.tensor_file import write_tensors


def write(target: Path, text: str = "new") -> None:
    with replacing(target) as partial:
        partial.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, permissions: int) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(permissions)
    write(target)
    assert (target.read_text(), mode(target)) == ("new", permissions)


def test_a_new_file_has_those_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write(tmp_path / "file")
    assert mode(tmp_path / "file") == mode(tmp_path / "other")


def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "umask")
    write(tmp_path / "file")


def test_partial_files_of_dead_writers_are_swept(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / f".file.{digit * 16}.partial" for digit in "abc")
    other = other.with_name(".file.bak")
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    # folders of libraries that write under names of their own
    gone, live = (tmp_path / f".file.{digit * 16}.partial" for digit in "de")
    for folder in (gone, live):
        folder.mkdir()
        (folder / "a").touch()
        os.utime(folder, (0, 0))
    os.utime(gone / "a", (0, 0))
    write(tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {fresh.name, ".file.bak", "file", live.name}


def test_what_safetensors_writes_beside_a_file_is_swept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(specs: object, path: Path, metadata: object) -> None:
        (path.parent / ".tmpAb3dE9").touch()
        assert [re.sub("[0-9a-f]{16}", "", p.name) for p in tmp_path.iterdir()] == [".file..partial"] * 2
        raise KeyboardInterrupt

    monkeypatch.setattr("visadapt.tensor_file.serialize_file", begun)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "file", {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, where, full)
        with pytest.raises(VisadaptError, match=r"cannot write .*file: No space left on device"):
            write(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_descriptors_a_task_is_saved_not_at_all(tmp_path: Path) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="a")
    path = visadapt.save(model, "a", tmp_path / "a.visadapt")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for call in (lambda: visadapt.save(model, "a", path), lambda: visadapt.load(model, path, task="b")):
            with pytest.raises(VisadaptError, match="Too many open files"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.visadapt"]


@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_left_in_a_folder_that_is_renamed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    folder, moved = tmp_path / "folder", tmp_path / "moved"
    folder.mkdir()

    def written(specs: object, path: Path, metadata: object) -> None:
        path.touch()
        if not late:
            folder.rename(moved)

    monkeypatch.setattr("visadapt.tensor_file.serialize_file", written)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (folder.rename(moved), real(file)))
    with pytest.raises(VisadaptError, match=r"cannot write .*file: No such file"):
        write_tensors(folder / "file", {}, {})
    assert not list(moved.iterdir())
    assert not folder.exists()


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as partial:
            partial.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
