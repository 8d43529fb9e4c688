"""A file is compared with itself before memory is taken for what it describes; bounds can be raised."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import visadapt
from tests.models import ZOO, same, snapshot
from visadapt import VisadaptError
from visadapt.bounded_json import parse_json
from visadapt.data import load_text, read_images
from visadapt.data.bounded import unpack_zip
from visadapt.data.inputs import ImageInputs
from visadapt.limits import LIMITS, limit, variable
from visadapt.tensor_file import read_described, write_described

HUGE = 10**8


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, and forbids large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.bytes += made.nbytes
        return made


@contextlib.contextmanager
def little_memory(gigabytes: float = 2) -> Any:
    """No more address space than now and a little: a large allocation fails rather than filling the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ZOO["tiny/resnet"].make()
    visadapt.inject(model, m=2, task="a", num_classes=3, labels=("x", "y", "z"))
    return visadapt.save(model, "a", tmp_path_factory.mktemp("sizes") / "a.visadapt")


def methods(name: str, times: int = 1, **options: Any) -> Any:
    return lambda d: {"placements": [{"method": name, "options": options, "sites": []}] * times}


def bottleneck(sites: int = 1, placements: int = 1, **options: Any) -> Any:
    def change(d: Any) -> Any:
        (one,) = d["placements"]
        changed = {**one, "options": {**one["options"], **options}, "sites": one["sites"] * sites}
        return {"placements": [changed] * placements}

    return change


def traced(*entry: Any, kinds: int = 0) -> Any:
    def change(d: Any) -> Any:
        (one,) = d["placements"]
        names = [f"k{i}:layer1.0.bn2" for i in range(kinds)] or one["sites"][:1]
        return {
            "traced": {name: list(entry) for name in names},
            "placements": [{**one, "sites": [*names, *one["sites"][1:]]}],
        }

    return change


SIZES: dict[str, tuple[Any, str]] = {
    "a width": (bottleneck(m=HUGE), rf"bottleneck\.down\.weight is \(2, 8\), expected \({HUGE}, 8\)"),
    "a width beyond integers": (bottleneck(m=10**30), "m must be a positive integer"),
    "a width of another method": (
        lambda d: {"placements": [{"method": "LoRA", "options": {"r": HUGE}, "sites": ["conv3x3:layer1.0.conv1"]}]},
        r"it lacks layer1\.0\.conv1\.lora\.a",
    ),
    "a fraction": (bottleneck(m=0.999999), r"is \(2, 8\), expected \(8, 8\)"),
    "sites that repeat": (bottleneck(sites=500), r"bottleneck at layer1\.0\.bn2 is described twice"),
    "placements that repeat": (bottleneck(placements=500), r"bottleneck at layer1\.0\.bn2 is described twice"),
    "methods without sites that repeat": (methods("Norms", 500), "norms is described twice"),
    "the whole backbone": (methods("Full"), r"it lacks full\.conv1\.weight"),
    "the whole backbone many times": (methods("Full", 500), r"it lacks full\.conv1\.weight"),
    "channels": (traced(HUGE, "NCHW", 0, [], ""), rf"is \(2, 8\), expected \(2, {HUGE}\)"),
    "negative channels": (traced(-1, "NCHW", 0, [], ""), "has one of another type"),
    "channels that are a flag": (traced(True, "NCHW", 0, [], ""), "has one of another type"),
    "one host of many kinds": (traced(8, "NCHW", 0, [], "", kinds=500), r"layer1\.0\.bn2 is described twice"),
    "classes": (lambda d: {"num_classes": HUGE, "labels": None}, rf"is \(3, 32\), expected \({HUGE}, 32\)"),
    "classes and labels": (lambda d: {"num_classes": 4}, "3 labels for a head of 4 classes"),
    "a label twice": (lambda d: {"labels": ["x", "y", "x"]}, "a label twice"),
    "outputs per class": (
        lambda d: {"head_at": {"modules": ["fc"], "finals": [["fc", HUGE, 0]]}},
        rf"is \(3, 32\), expected \({3 * HUGE}, 32\)",
    ),
    "a head that repeats": (
        lambda d: {"head_at": {"modules": ["fc"] * 500, "finals": [["fc", 1, 0]]}},
        "its own fc and its own fc: one lies in the other",
    ),
    "a head without tensors": (
        lambda d: {"head_at": {"modules": ["layer4"], "finals": []}, "head": "copy", "num_classes": None},
        "layer4 has .* values, and the file has 0 for it",
    ),
    "modules that lie in each other": (
        lambda d: {"also": ["layer4", "layer4.0"]},
        r"its own layer4 and its own layer4\.0: one lies in the other",
    ),
    "modules without tensors": (lambda d: {"also": ["layer4"]}, "layer4 has .* values, and the file has 0 for it"),
    "a format that is a flag": (lambda d: {"format": True}, "has one of another type"),
    "depth": (lambda d: {"notes": {"x": json.loads("[" * 100 + "]" * 100)}}, variable("JSON_DEPTH")),
    "digits": (lambda d: {"notes": {"x": 10**200}}, variable("JSON_DIGITS")),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_checked_before_memory_is_taken(written: Path, tmp_path: Path, case: str) -> None:
    change, message = SIZES[case]
    content = read_described(written, "visadapt", "task file")
    model = ZOO["tiny/resnet"].make()
    description = {**content.description, **change(content.description)}
    if case.startswith(("a head", "modules")):
        # the fingerprint of an attacker who knows the backbone
        owned = description.get("head_at", {"modules": ["fc"]})["modules"] + description.get("also", [])
        description["backbone"] = visadapt.task_file.fingerprint(model, owned)
    file = tmp_path / "m.visadapt"
    write_described(file, "visadapt", description, content.tensors)
    before, start = snapshot(model), time.perf_counter()
    with little_memory(), Allocations() as made, pytest.raises(VisadaptError, match=message):
        visadapt.load(model, file)
    with Allocations() as honest:
        visadapt.load(ZOO["tiny/resnet"].make(), written)
    assert made.bytes < 2 * honest.bytes
    assert time.perf_counter() - start < 5
    assert visadapt.tasks(model) == {}
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_another_kind_of_number_is_refused(written: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    content = read_described(written, "visadapt", "task file")
    name = next(iter(content.tensors))
    tensors = {**content.tensors, name: content.tensors[name].to(dtype)}
    write_described(tmp_path / "m.visadapt", "visadapt", content.description, tensors)
    with pytest.raises(VisadaptError, match=f"{name} is {dtype}, expected torch.float32"):
        visadapt.load(ZOO["tiny/resnet"].make(), tmp_path / "m.visadapt")


@pytest.mark.parametrize(
    ("text", "name"),
    [("[" * 65 + "]" * 65, "JSON_DEPTH"), ('{"a":' * 65 + "1" + "}" * 65, "JSON_DEPTH"), ("9" * 101, "JSON_DIGITS")],
)
def test_bounds_of_json_can_be_raised(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VisadaptError, match=variable(name)):
        parse_json(text)
    monkeypatch.setenv(variable(name), "1000")
    assert parse_json(text) is not None


def test_brackets_in_strings_are_not_depth() -> None:
    assert parse_json(json.dumps({"a": "[" * 500, "b": '\\"[' * 500})) == {"a": "[" * 500, "b": '\\"[' * 500}


def test_the_size_of_json_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("JSON_BYTES"), "10")
    with pytest.raises(VisadaptError, match="more than 10 bytes of JSON"):
        parse_json('"' + "x" * 10 + '"')


@pytest.mark.parametrize("value", ["", "0", "-1", "1e9", "ten", "9" * 30])
def test_a_bound_that_is_not_a_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("JSON_DEPTH"), value)
    with pytest.raises(VisadaptError, match="VISADAPT_MAX_JSON_DEPTH must be a positive integer"):
        limit("JSON_DEPTH")


def test_defaults() -> None:
    assert {name: limit(name) for name in LIMITS} == {name: default for name, (default, _) in LIMITS.items()}


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.png"
    Image.new("RGB", (600, 500)).save(file)
    monkeypatch.setenv(variable("IMAGE_PIXELS"), "299999")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(VisadaptError, match=r"large\.png has more than 299,999 pixels"):
        read_images([file], 8)
    monkeypatch.setenv(variable("IMAGE_PIXELS"), "300000")
    assert read_images([file], 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("options", [{}, {"crop_mode": "center"}], ids=["square", "timm"])
def test_an_image_that_is_long_and_narrow_is_refused_before_it_is_resized(
    size: tuple[int, int], options: dict[str, str]
) -> None:
    # its shorter side at 64 pixels, it would have 246 million
    with little_memory(1), pytest.raises(VisadaptError, match="resized to 64 on its shorter side, has more than"):
        ImageInputs(64, **options).read([Image.new("RGB", size)])


def test_a_bomb_of_the_default_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(file)
    assert file.stat().st_size < 100_000
    with little_memory(1), pytest.raises(VisadaptError, match=r"bomb\.png"):
        read_images([file], 8)


def test_an_archive_that_grows_without_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.tsv.gz"
    with gzip.open(file, "wb", compresslevel=9) as packed:
        packed.write(b"text\tlabel\n")
        for _ in range(64):
            packed.write(b"x\ty\n" * (1 << 18))
    assert file.stat().st_size < 1_000_000
    with little_memory(1), pytest.raises(VisadaptError, match="more than 100 bytes per byte on the disk"):
        load_text(file)
    small = tmp_path / "small.tsv.gz"
    with gzip.open(small, "wb") as packed:
        packed.write(b"text\tlabel\n" + b"x\ty\nz\tw\n" * 50_000)
    assert len(load_text(small).train)


def test_one_endless_line_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "line.csv.gz"
    with gzip.open(file, "wb", compresslevel=9) as packed:
        for _ in range(64):
            packed.write(b"x" * (1 << 20))
    with little_memory(1), pytest.raises(VisadaptError, match="VISADAPT_MAX_UNPACKED_RATIO"):
        load_text(file)


@pytest.mark.parametrize("content", ["bomb", "encrypted", "damaged"])
def test_a_zip_file_is_unpacked_within_the_bound_or_refused(tmp_path: Path, content: str) -> None:
    file, out = tmp_path / "data.zip", tmp_path / "out"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 25) if content == "bomb" else b"a few")
    data = bytearray(file.read_bytes())
    if content == "encrypted":
        data[6] |= 1  # the flag in the local header, and in the directory
        data[data.index(b"PK\x01\x02") + 8] |= 1
    elif content == "damaged":
        data[data.index(b"zeros") + 5] ^= 255
    file.write_bytes(data)
    with pytest.raises(VisadaptError, match=r"data\.zip has more than 100|cannot unpack .*data\.zip: "):
        unpack_zip(file, out)
    assert not list(out.rglob("*")) or content == "damaged"
