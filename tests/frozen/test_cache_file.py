"""The file of a prefix cache: whole or made again, never written to where others read, a full disk is an error."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import torch

import visadapt
from tests.frozen.test_cache_is_of import prepared
from visadapt import VisadaptError, cache_prefix
from visadapt.frozen.cache_file import CacheFile
from visadapt.frozen.prefix import Prefix


@pytest.fixture
def runs(monkeypatch):
    """The batches that prefixes computed."""
    made = []
    compute = Prefix.compute
    monkeypatch.setattr(Prefix, "compute", lambda self, x: made.append(len(x)) or compute(self, x))
    return made


def kept(model, x, file, task="late", **options):
    cached = cache_prefix(model, task, x, file=file, **options)
    cached.prefix.close()
    return cached.features


def halved(file):
    os.truncate(file, os.path.getsize(file) // 2)


def lengthened(file):
    os.truncate(file, os.path.getsize(file) + 8)


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def zeroed(file):
    file.write_bytes(bytes(os.path.getsize(file)))


def key_of_an_older_version(file):
    with open(f"{file}.key", "w") as key:
        key.write("0" * 64)


def key_with(**changes):
    def change(file):
        with open(f"{file}.key") as key:
            found = json.load(key)
        with open(f"{file}.key", "w") as key:
            json.dump({**found, **changes}, key)

    return change


DAMAGES = {
    "cut in half": halved,
    "longer": lengthened,
    "one bit": flipped,
    "zeros": zeroed,
    "gone": os.remove,
    "old key": key_of_an_older_version,
    "another digest": key_with(digest="00"),
    "another shape": key_with(shape=[1]),
    "a list for an identity": key_with(identity=[]),
    "deep": lambda file: file.with_name(f"{file.name}.key").write_text("[" * 100_000),
    "not text": lambda file: file.with_name(f"{file.name}.key").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(tmp_path, damage, runs):
    model, x = prepared()
    file = tmp_path / "features"
    expected = kept(model, x, file).clone()
    DAMAGES[damage](file)
    runs.clear()
    assert torch.equal(kept(model, x, file), expected)
    assert 6 in runs
    runs.clear()
    assert torch.equal(kept(model, x, file), expected)
    assert 6 not in runs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "features.key"]


def test_a_file_is_reused_for_the_same_and_nothing_else(tmp_path, runs):
    model, x = prepared()
    file = tmp_path / "features"

    def made_for(**options):
        runs.clear()
        options = {"model": model, "x": x, "file": file, **options}
        features = kept(**options).clone()
        fresh = 6 in runs
        assert torch.equal(features, kept(**{**options, "file": None}))
        return fresh

    changed = x.clone()
    changed[5, 2, 31, 31] += 1e-3
    scale = 3
    requests = [
        {},
        {"task": "early"},
        {"x": changed},
        {"prepare": lambda batch: batch * 2},
        {"prepare": lambda batch: batch * scale},
        {"augment": lambda batch, noise: batch * 4},
        {"augment": lambda batch, noise: batch * 3 + torch.rand(1, generator=noise)},
        {"augment": lambda batch, noise: batch + torch.rand(1, generator=noise), "seed": 1},
        {"augment": lambda batch, noise: batch + torch.rand(1, generator=noise), "seed": 2},
        {"augment": lambda batch, noise: batch + torch.rand(1, generator=noise), "seed": 2, "views": 2},
    ]
    for request in requests:
        assert made_for(**request) is True
        assert made_for(**request) is False
    # what is done, not what it is called
    assert made_for(prepare=lambda batch: batch * 3) is True
    assert made_for(prepare=lambda batch: batch + batch + batch) is False
    model.blocks[1].attn.proj.weight.data[1, 1] += 1e-3
    assert made_for() is True
    model.blocks[0].mlp.act = torch.nn.ReLU()
    assert made_for() is True


def test_augmentation_that_is_not_the_generators_is_never_reused(tmp_path, runs):
    model, x = prepared()
    for _ in range(2):
        runs.clear()
        kept(model, x, tmp_path / "features", augment=lambda batch, noise: batch + torch.randn_like(batch))
        assert 6 in runs


def test_who_reads_a_file_goes_on_reading_it(tmp_path):
    model, x = prepared()
    file = tmp_path / "features"
    first = kept(model, x, file)
    before = first.clone()
    kept(model, x.flip(0), file)
    assert torch.equal(first, before)
    # nor does it reach the file what is done to the tensor
    again = kept(model, x, file)
    again.zero_()
    assert torch.equal(kept(model, x, file), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(tmp_path, dtype, runs):
    model, x = prepared()
    model.to(dtype)
    x = x.to(dtype)
    first = kept(model, x, tmp_path / "features").clone()
    runs.clear()
    again = kept(model, x, tmp_path / "features")
    assert again.dtype == first.dtype == dtype
    assert torch.equal(again, first)
    assert 6 not in runs


@contextmanager
def limited(size):
    """No file of this process may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("allocates", [True, False])
def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path, monkeypatch, allocates, runs):
    model, x = prepared()
    file = tmp_path / "features"
    expected = kept(model, x, file).clone()
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    classes = [type(module) for module in model.modules()]
    runs.clear()
    with limited(2000), pytest.raises(VisadaptError, match=r"cannot keep .* MB of features in .*: File too large"):
        cache_prefix(model, "late", x + 1, file=file)
    assert (6 in runs) is not allocates
    assert [type(module) for module in model.modules()] == classes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "features.key"]
    runs.clear()
    assert torch.equal(kept(model, x, file), expected)
    assert 6 not in runs


@pytest.mark.parametrize(("number", "refused"), [(errno.ENOSPC, True), (errno.EOPNOTSUPP, False)])
def test_a_disk_that_cannot_allocate_is_written_to(tmp_path, monkeypatch, number, refused):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fails)
    model, x = prepared()
    if refused:
        with pytest.raises(VisadaptError, match="No space left"):
            kept(model, x, tmp_path / "features")
    else:
        kept(model, x, tmp_path / "features")


@pytest.mark.parametrize("where", ["missing/features", "file/features"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, where):
    (tmp_path / "file").write_text("")
    model, x = prepared()
    with pytest.raises(VisadaptError, match="cannot keep"):
        cache_prefix(model, "late", x, file=tmp_path / where)


def test_what_is_no_cache_is_not_written_over(tmp_path):
    model, x = prepared()
    own = tmp_path / "thesis.txt"
    own.write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "features.key")
    for place in (own, tmp_path / "pipe", tmp_path / "features", tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(VisadaptError, match="file must be a file of features"):
            kept(model, x, place)
        assert sorted(tmp_path.iterdir()) == before
    assert own.read_text() == "mine"
    # a file that tempfile made is empty
    empty = tmp_path / "empty"
    empty.touch()
    assert torch.equal(kept(model, x, empty), kept(model, x, empty))


def test_an_error_while_it_is_made_leaves_nothing(tmp_path):
    model, x = prepared()
    calls = []

    def fails(batch):
        calls.append(len(batch))
        if len(calls) > 4:
            raise RuntimeError("no more")
        return batch

    with pytest.raises(RuntimeError, match="no more"):
        cache_prefix(model, "late", x, prepare=fails, batch_size=2, file=tmp_path / "features")
    assert not list(tmp_path.iterdir())


def test_of_two_writers_one_waits_and_reads_what_the_other_wrote(tmp_path):
    file = CacheFile(tmp_path / "features", (4, 8), torch.float32)
    order, started = [], threading.Event()

    def slow():
        with file.writing() as writer:
            order.append("first began")
            started.set()

            def parts():
                time.sleep(0.3)
                yield torch.ones(4, 8)

            writer.write(parts(), lambda: {"of": "this"})
            order.append("first ended")

    thread = threading.Thread(target=slow)
    thread.start()
    started.wait()
    with file.writing():
        order.append("second began")
        assert torch.equal(file.read({"of": "this"}), torch.ones(4, 8))
    thread.join()
    assert order == ["first began", "first ended", "second began"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "features.key"]


def test_a_writer_that_died_is_in_nobodys_way(tmp_path):
    script = f"""
        import os, signal, torch
        from visadapt.frozen.cache_file import CacheFile
        def parts():
            yield torch.ones(2, 8)
            os.kill(os.getpid(), signal.SIGKILL)
        with CacheFile({os.fspath(tmp_path / "features")!r}, (4, 8), torch.float32).writing() as writer:
            writer.write(parts(), dict)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["features.partial"]
    model, x = prepared()
    expected = kept(model, x, None)
    assert torch.equal(kept(model, x, tmp_path / "features"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "features.key"]


def test_a_cache_that_is_open_survives_the_file(tmp_path):
    model, x = prepared()
    cached = cache_prefix(model, "late", x, file=tmp_path / "features")
    for path in tmp_path.iterdir():
        path.unlink()
    with torch.no_grad(), visadapt.using(model, "late"):
        torch.testing.assert_close(cached(cached.rows).resume(), model(x))
