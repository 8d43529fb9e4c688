"""Described files: what was changed after it was written is refused, and read in one piece."""

import copy
import itertools
import random
import time

import pytest
import torch

import visadapt
from benchmarks.mutants import damaged
from tests.models import ZOO, same, stir
from visadapt import VisadaptError
from visadapt.bounded_json import parse_json
from visadapt.runtime.decider import KIND as DECIDER
from visadapt.task_file import KIND as TASK
from visadapt.tensor_file import read_described, write_described


def mutants(data: bytes, count: int, seed: int):
    """Damaged copies of a file."""
    rng = random.Random(seed)
    return (damaged(data, rng) for _ in range(count))


@pytest.fixture(scope="module")
def model():
    model = ZOO["tiny/resnet"].make()
    for task in ("a", "b"):
        visadapt.inject(model, m=2, task=task, num_classes=3, labels=("x", "y", "z"))
        stir(model, task)
    visadapt.fit_decider(model, {"a": [torch.zeros(2, 3, 32, 32)], "b": [torch.ones(2, 3, 32, 32)]})
    return model.eval()


def test_a_damaged_task_file_is_refused_or_answers_as_before(model, tmp_path) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), visadapt.using(model, "a"):
        expected = model(x)
    data = visadapt.save(model, "a", tmp_path / "a").read_bytes()
    bare = copy.deepcopy(model)
    visadapt.remove(bare, "a")
    accepted = 0
    for number, mutant in enumerate(mutants(data, 500, seed=0)):
        (tmp_path / "m").write_bytes(mutant)
        try:
            visadapt.load(bare, tmp_path / "m", task="m")
        except VisadaptError:
            continue
        accepted += 1
        with torch.no_grad(), visadapt.using(bare, "m"):
            assert torch.equal(bare(x), expected), number
        visadapt.remove(bare, "m")
    assert accepted < 50
    assert set(visadapt.tasks(bare)) == {"b"}


def test_a_damaged_decider_is_refused_or_decides_as_before(model, tmp_path) -> None:
    x = torch.randn(4, 3, 32, 32)
    expected = visadapt.decide(model, x)
    data = visadapt.save_decider(model, tmp_path / "d").read_bytes()
    for mutant in mutants(data, 200, seed=1):
        (tmp_path / "m").write_bytes(mutant)
        try:
            visadapt.load_decider(model, tmp_path / "m")
        except VisadaptError:
            continue
        assert visadapt.decide(model, x) == expected


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_deep_json_is_refused(tmp_path, depth) -> None:
    write_described(tmp_path / "f", "visadapt", {"notes": "HERE"}, {"t": torch.ones(1)})
    deep = "[" * depth + "]" * depth
    data = (tmp_path / "f").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'\\"HERE\\"', deep.encode()).rstrip()
    header += b" " * (-len(header) % 8)
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + data[-4:])
    with pytest.raises(VisadaptError):
        read_described(tmp_path / "f", "visadapt", "task file")


def test_a_string_that_is_never_closed_is_refused_at_once() -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match="Unterminated string"):
        parse_json("[" * 17 + '"' + '\\"' * 300_000)
    assert time.process_time() - begun < 2


def test_json_is_one_thing_to_all_programs_and_takes_little_memory() -> None:
    with pytest.raises(ValueError, match="it has the key 'a' twice"):
        parse_json('{"x": [{"a": 1, "b": 2, "a": 1}]}')
    many = ", ".join(f'"k{i}": 0' for i in range(60_000))
    begun = time.process_time()
    with pytest.raises(ValueError, match="it has the key 'k59999' twice"):
        parse_json(f'{{{many}, "k59999": 0}}')
    assert time.process_time() - begun < 5
    for text in ("[" + "[]," * 600_000 + "1]", "[" + "1," * 1_100_000 + "1]"):
        with pytest.raises(VisadaptError, match=r"1,000,000 values in JSON: .* VISADAPT_MAX_JSON_VALUES"):
            parse_json(text)


def test_a_file_of_holes_is_refused(tmp_path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(VisadaptError, match=r"f has more than 100 bytes per byte on the disk"):
        read_described(tmp_path / "f", DECIDER, "decider")


def test_every_dtype_and_shape_comes_back(tmp_path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "odd": torch.arange(7, dtype=torch.int8),
        "bf16": torch.randn(3, 5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "strided": torch.randn(4, 6).t(),
    }
    write_described(tmp_path / "f", DECIDER, {"n": [1, None, "ü"]}, tensors)
    content = read_described(tmp_path / "f", DECIDER, "decider")
    assert content.description == {"n": [1, None, "ü"]}
    assert len(content.digest) == 64
    assert set(content.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert content.tensors[name].dtype == tensor.dtype
        assert torch.equal(content.tensors[name], tensor)


def test_other_descriptions_and_files_are_named(tmp_path) -> None:
    write_described(tmp_path / "f", DECIDER, {"n": 1}, {"t": torch.ones(1)})
    with pytest.raises(VisadaptError, match="f is not a task file: its header has no description 'visadapt'"):
        read_described(tmp_path / "f", "visadapt", "task file")
    with pytest.raises(VisadaptError, match="must be a file, got a folder"):
        read_described(tmp_path, DECIDER, "decider")
    with pytest.raises(VisadaptError, match="the description of g must be JSON"):
        write_described(tmp_path / "g", DECIDER, {"n": object()}, {})
    assert not (tmp_path / "g").exists()


def test_a_description_over_the_tensors_of_another_file_is_refused(tmp_path) -> None:
    methods = (visadapt.Bottleneck(2), visadapt.Parallel(), visadapt.LoRA(r=2), visadapt.SSF(), visadapt.TopLayers())
    contents = {}
    for method in methods:
        adapted = visadapt.inject(ZOO["tiny/resnet"].make(), method, task="a", num_classes=3)
        contents[method] = read_described(visadapt.save(adapted, "a", tmp_path / "a"), TASK, "task file")
    bare = ZOO["tiny/resnet"].make()
    before = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    for one, other in itertools.permutations(methods, 2):
        # with a digest of its own, as if by an author who means harm
        write_described(tmp_path / "m", TASK, contents[one].description, contents[other].tensors)
        with pytest.raises(VisadaptError):
            visadapt.load(bare, tmp_path / "m")
    assert same(bare.state_dict(), before)
    assert type(bare) is type(ZOO["tiny/resnet"].make())
