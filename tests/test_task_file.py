"""Promise 5: task files are portable, strict, atomic, and know their backbone."""

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, answer, same, snapshot, stir, train
from visadapt import VisadaptError
from visadapt.task_file import read
from visadapt.tensor_file import read_described, write_described

ROOT = Path(__file__).parents[1]


@pytest.fixture
def flowers(tiny, image, tmp_path):
    """A tiny model with a trained task, its file, and its answer."""
    visadapt.inject(tiny, m=2, task="flowers", norms="full", num_classes=3, labels=["rose", "tulip", "oxlip"])
    train(tiny, "flowers", {"x": image})
    path = visadapt.save(tiny, "flowers", tmp_path / "flowers.visadapt")
    return path, answer(tiny, {"x": image}, "flowers")


@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_load_gives_back_what_was_saved(model, inputs, tmp_path, norms) -> None:
    visadapt.inject(model, m=4, task="flowers", norms=norms, num_classes=5, labels=list("abcde"))
    train(model, "flowers", inputs, steps=1)
    expected = answer(model, inputs, "flowers")
    description = visadapt.tasks(model)["flowers"]
    path = visadapt.save(model, "flowers", tmp_path / "flowers.visadapt")
    visadapt.eject(model)
    assert visadapt.load(model, path) == "flowers"
    assert visadapt.active(model) == "flowers"
    assert visadapt.tasks(model)["flowers"] == description
    assert torch.equal(answer(model, inputs, "flowers"), expected)
    assert all(p.requires_grad for p in visadapt.parameters(model, "flowers"))
    visadapt.load(model, path, task="again")
    stir(model, "flowers")
    assert torch.equal(answer(model, inputs, "again"), expected)


def test_notes_come_back_and_add_up(flowers, tiny, tmp_path) -> None:
    first = visadapt.save(tiny, "flowers", tmp_path / "first.visadapt", notes={"size": 64})
    fresh = ZOO["tiny/resnet"].make()
    visadapt.load(fresh, first)
    assert visadapt.tasks(fresh)["flowers"].notes == {"size": 64}
    second = visadapt.save(fresh, "flowers", tmp_path / "second.visadapt", notes={"by": ["ada", 1]})
    assert read(second).description["notes"] == {"size": 64, "by": ["ada", 1]}


def test_notes_that_are_no_json_are_refused_and_nothing_is_written(flowers, tiny, tmp_path) -> None:
    with pytest.raises(VisadaptError, match="the notes of task 'flowers' must be JSON"):
        visadapt.save(tiny, "flowers", tmp_path / "new.visadapt", notes={"size": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["flowers.visadapt"]


LOAD_ELSEWHERE = """
import sys, torch, visadapt
from tests.models import ZOO, answer
for name in sys.argv[2:]:
    member, stem = ZOO[name], name.replace("/", "-")
    model = member.make()
    visadapt.load(model, f"{sys.argv[1]}/{stem}.visadapt")
    expected = torch.load(f"{sys.argv[1]}/{stem}.pt", weights_only=True)
    assert torch.equal(answer(model, member.inputs(), "flowers"), expected), name
"""


@pytest.mark.parametrize(
    "names",
    [
        ["tiny/resnet", "tiny/vgg_bn", *(name for name, m in ZOO.items() if m.text)],
        pytest.param(["torchvision/vgg16_bn", "timm/resnet26t", "timm/seresnet50"], marks=pytest.mark.slow),
    ],
    ids=["small", "large"],
)
def test_a_new_process_answers_bit_for_bit(names, tmp_path) -> None:
    for name in names:
        member, stem = ZOO[name], name.replace("/", "-")
        model = visadapt.inject(member.make(), m=4, task="flowers", norms="full", num_classes=5)
        stir(model, "flowers")
        visadapt.save(model, "flowers", tmp_path / f"{stem}.visadapt")
        torch.save(answer(model, member.inputs(), "flowers"), tmp_path / f"{stem}.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path), *names], env=environment, cwd=ROOT, check=True)


def test_a_file_holds_the_tasks_tensors_and_nothing_of_the_backbone(model, tmp_path) -> None:
    backbone = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    visadapt.inject(model, m=2, task="other")
    visadapt.inject(model, m=2, task="flowers", norms="affine", head="frozen", where=0)
    path = visadapt.save(model, "flowers", tmp_path / "f")
    tensors = load_file(path)
    own = {key.replace(".visadapt.flowers", ""): value for key, value in model.state_dict().items() if "flowers" in key}
    assert same(dict(sorted(tensors.items())), dict(sorted(own.items())))
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in visadapt.parameters(model, "flowers"))
    assert path.stat().st_size < 0.4 * backbone or backbone < 400_000
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["visadapt"])["task"] == "flowers"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_file_are_kept(flowers, tmp_path, dtype) -> None:
    path, _ = flowers
    content = read_described(path, "visadapt", "task file")
    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in content.tensors.items()}
    other = tmp_path / "other.visadapt"
    write_described(other, "visadapt", content.description, tensors)
    model = ZOO["tiny/resnet"].make()
    visadapt.load(model, other)
    assert {p.dtype for p in visadapt.parameters(model, "flowers")} == {dtype}
    visadapt.save(model, "flowers", tmp_path / "third.visadapt")
    assert same(load_file(tmp_path / "third.visadapt"), load_file(other))


def test_saving_twice_gives_the_same_bytes(flowers, tiny, tmp_path) -> None:
    path, _ = flowers
    assert visadapt.save(tiny, "flowers", tmp_path / "b").read_bytes() == path.read_bytes()


def test_paths_may_be_strings(flowers, tiny, tmp_path) -> None:
    written = visadapt.save(tiny, "flowers", str(tmp_path / "string"))
    assert visadapt.load(tiny, str(written), task="again") == "again"


def test_a_file_is_readable_by_whoever_the_umask_allows(flowers, tiny, tmp_path) -> None:
    old = os.umask(0o027)
    try:
        path = visadapt.save(tiny, "flowers", tmp_path / "umask")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_loading_builds_each_adapter_once_and_draws_nothing(flowers, monkeypatch) -> None:
    path, _ = flowers
    model, built, build = ZOO["tiny/resnet"].make(), [], visadapt.Bottleneck.build
    monkeypatch.setattr(visadapt.Bottleneck, "build", lambda *given: built.append(build(*given)) or built[-1])
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.is_meta or pytest.fail("drawn"))
    visadapt.load(model, path)
    assert len(built) == len(visadapt.tasks(model)["flowers"].placements[0].sites)
    assert not any(p.is_meta for p in visadapt.parameters(model, "flowers"))


def test_loading_leaves_the_callers_random_numbers_alone(flowers) -> None:
    path, _ = flowers
    model = ZOO["tiny/resnet"].make()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    visadapt.load(model, path)
    assert torch.equal(torch.rand(3), expected)


class UnforeseenError(Exception):
    """Something that visadapt does not expect."""


@pytest.mark.parametrize("moment", ["serialise", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "disk full"), UnforeseenError(), KeyboardInterrupt()], ids=repr)
def test_a_write_is_whole_or_not_there(flowers, tiny, tmp_path, monkeypatch, moment, error) -> None:
    path, _ = flowers
    before = path.read_bytes()

    def half(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise error

    def refuse(source, target):
        raise error

    if moment == "serialise":
        monkeypatch.setattr("visadapt.tensor_file.serialize_file", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    stir(tiny, "flowers")
    with pytest.raises(VisadaptError if isinstance(error, OSError) else type(error)):
        visadapt.save(tiny, "flowers", path)
    with pytest.raises(VisadaptError if isinstance(error, OSError) else type(error)):
        visadapt.save(tiny, "flowers", tmp_path / "new.visadapt")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_a_clear_error(flowers, tiny, tmp_path) -> None:
    path, _ = flowers
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(VisadaptError, match=r"cannot write .*flowers\.visadapt.*File too large"):
            visadapt.save(tiny, "flowers", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def other_weights():
    return ZOO["tiny/resnet"].make(seed=1)


def one_other_weight():
    model = ZOO["tiny/resnet"].make()
    with torch.no_grad():
        model.layer3[1].conv2.weight[0, 0, 0, 0] += 1e-3
    return model


def other_statistics():
    model = ZOO["tiny/resnet"].make()
    model.layer2[0].bn1.running_mean += 1
    return model


def other_depth():
    import timm

    return timm.create_model("resnet34", channels=(8, 16, 24, 32), num_classes=10).eval()


def other_width():
    import timm

    return timm.create_model("resnet18", channels=(8, 16, 24, 40), num_classes=10).eval()


def half_precision():
    return ZOO["tiny/resnet"].make().to(torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "message", "shapes_suffice"),
    [
        (other_weights, r"other weights in conv1, bn1, layer1\.0, layer1\.0\.down.* and 14 more blocks; check=", True),
        (one_other_weight, r"other weights in layer3\.1; check='shapes' loads it all the same", True),
        (other_statistics, r"other weights in layer2\.0;", True),
        (half_precision, r"other weights in conv1", True),
        (other_depth, r"it has beyond it layer1\.2, layer2\.2, layer2\.3, layer3\.2", False),
        (other_width, r"other names or shapes in layer4\.0, layer4\.0\.downsample\.0,.*layer4\.1", False),
        (ZOO["tiny/vgg_bn"].make, r"it lacks conv1, bn1.*it has beyond it features\.0", False),
        (ZOO["transformers/bert"].make, r"than this BertForSequenceClassification: it lacks conv1", False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_another_backbone_is_refused_and_what_differs_named(flowers, build, message, shapes_suffice) -> None:
    path, _ = flowers
    model = build()
    before, state = anatomy(model), snapshot(model)
    with pytest.raises(VisadaptError, match=message):
        visadapt.load(model, path)
    if not shapes_suffice:
        with pytest.raises(VisadaptError, match=message):
            visadapt.load(model, path, check="shapes")
    assert anatomy(model) == before
    assert same(model.state_dict(), state)
    if shapes_suffice:
        assert visadapt.load(model, path, check="shapes") == "flowers"


def test_a_head_of_the_tasks_own_says_nothing_of_the_backbones(flowers) -> None:
    """A backbone with the head of another problem is the same backbone for a task that brings its own."""
    import timm

    path, expected = flowers
    model = ZOO["tiny/resnet"].make()
    other = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=77).eval()
    other.load_state_dict({**model.state_dict(), "fc.weight": other.fc.weight, "fc.bias": other.fc.bias})
    visadapt.load(other, path)
    assert torch.equal(answer(other, ZOO["tiny/resnet"].inputs(), "flowers"), expected)


def test_the_frozen_head_is_part_of_the_backbone(tiny, tmp_path) -> None:
    visadapt.inject(tiny, m=2, task="flowers", head="frozen")
    path = visadapt.save(tiny, "flowers", tmp_path / "f")
    model = ZOO["tiny/resnet"].make()
    with torch.no_grad():
        model.fc.bias += 1
    with pytest.raises(VisadaptError, match=r"other weights in fc"):
        visadapt.load(model, path)


def test_a_weight_written_behind_autograds_back_is_noticed(flowers, tiny, tmp_path) -> None:
    """Digests are kept between calls, and writes through ``.data`` bump no version counter."""
    path, _ = flowers
    tiny.conv1.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(VisadaptError, match="other weights in conv1"):
        visadapt.load(tiny, path, task="again")


def test_a_module_without_parameters_may_differ_too(tmp_path) -> None:
    """A site on an activation: its shapes and weights say nothing of it, so its absence must be noticed."""
    model = visadapt.inject(ZOO["tiny/vgg_bn"].make(), m=2, task="flowers")
    path = visadapt.save(model, "flowers", tmp_path / "f")
    other = ZOO["tiny/vgg_bn"].make()
    other.features[2] = nn.Identity()
    before = anatomy(other)
    with pytest.raises(VisadaptError, match=r"no site 'block:features\.2'"):
        visadapt.load(other, path)
    assert anatomy(other) == before


def test_a_traced_site_needs_no_trace_when_loaded(image, tmp_path, monkeypatch) -> None:
    home_made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(21600, 4))
    fresh = copy.deepcopy(home_made)
    visadapt.inject(home_made, m=2, task="flowers", where="1", example=image)
    stir(home_made, "flowers")
    path = visadapt.save(home_made, "flowers", tmp_path / "f")
    monkeypatch.setattr("visadapt.backbone.trace.rehearse", None)
    visadapt.load(fresh, path)
    with torch.no_grad():
        assert torch.equal(fresh(image), home_made(image))


def tamper(path: Path, target: Path, change) -> Path:
    content = read_described(path, "visadapt", "task file")
    change(content.description, content.tensors)
    write_described(target, "visadapt", content.description, content.tensors)
    return target


CHANGES = {
    "missing tensor": (lambda d, t: t.pop("fc.head.bias"), r"lacks fc\.head\.bias \(1 missing, 0 unexpected"),
    "unexpected tensor": (lambda d, t: t.update(x=torch.ones(1)), r"has x, which the task does not \(0 missing, 1 "),
    "other shape": (lambda d, t: t.update({"fc.head.bias": torch.ones(9)}), r"fc\.head\.bias is \(9,\), expected \(3"),
    "other format": (lambda d, t: d.update(format=99), r"has format 99; this version of visadapt reads 1"),
    "other method": (
        lambda d, t: d["placements"][0].update(method="Bottelneck"),
        r"a method 'Bottelneck'.*'Bottleneck'",
    ),
    "other option": (lambda d, t: d["placements"][0]["options"].update(q=1), r"Bottleneck does not take what the file"),
    "option out of range": (
        lambda d, t: d["placements"][0]["options"].update(m=-1),
        r"m must be a positive integer.*got -1",
    ),
    "other site": (lambda d, t: d["placements"][0]["sites"].append("block:layer9"), r"no site 'block:layer9'"),
    "bad name": (lambda d, t: d.update(task="a.b"), r"a task's name must be made of letters.*'a\.b'"),
    "bad norms": (lambda d, t: d.update(norms="affin"), r"no norm policy 'affin'.*did you mean 'affine'"),
    "bad head": (lambda d, t: d.update(head="newer"), r"no head policy 'newer'.*did you mean 'new'"),
    "bad width": (lambda d, t: d.update(num_classes=-3), r"num_classes must be a positive integer, got -3"),
    "width of another head": (lambda d, t: d.update(num_classes=4, labels=None), r"fc\.head\.\w+ is \(3.*expected \(4"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_file_that_contradicts_itself_is_refused(flowers, tmp_path, change) -> None:
    path, _ = flowers
    function, message = CHANGES[change]
    bad = tamper(path, tmp_path / "bad.visadapt", function)
    model = ZOO["tiny/resnet"].make()
    before, state = anatomy(model), snapshot(model)
    with pytest.raises(VisadaptError, match=message):
        visadapt.load(model, bad)
    assert anatomy(model) == before
    assert same(model.state_dict(), state)


def paths_in(value, path=()):
    """Every leaf and branch of nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield (*path, key)
        yield from paths_in(entry, (*path, key))


@pytest.mark.parametrize("change", ["dropped", "null", "nested"])
def test_any_damage_to_the_description_is_refused_or_harmless(flowers, tmp_path, change) -> None:
    """No KeyError from the inside: what is missing or of another form is an error of ours, or an option's default."""
    path, _ = flowers
    content = read_described(path, "visadapt", "task file")
    model = ZOO["tiny/resnet"].make()
    state, before = snapshot(model), anatomy(model)
    loaded = []
    for way in paths_in(content.description):
        description = copy.deepcopy(content.description)
        entry = description
        for key in way[:-1]:
            entry = entry[key]
        if change == "dropped":
            del entry[way[-1]]
        else:
            entry[way[-1]] = None if change == "null" else {"x": [1]}
        write_described(tmp_path / "bad.visadapt", "visadapt", description, content.tensors)
        try:
            visadapt.load(model, tmp_path / "bad.visadapt", task="x" if way == ("task",) else None)
        except VisadaptError:
            pass
        else:
            loaded.append(way)
            visadapt.eject(model)
        assert anatomy(model) == before
    assert same(model.state_dict(), state)
    assert all(way[:3] == ("placements", 0, "options") or way[0] in ("labels", "notes") for way in loaded)


@given(end=st.integers(0, 2_000), share=st.floats(0, 1))
def test_a_cut_file_is_refused(flowers, tmp_path, end, share) -> None:
    path, _ = flowers
    whole = path.read_bytes()
    cut = tmp_path / "cut.visadapt"
    for length in (min(end, len(whole) - 1), int(share * (len(whole) - 1))):
        cut.write_bytes(whole[:length])
        with pytest.raises(VisadaptError, match=r"cut\.visadapt is not a whole task file"):
            read(cut)
