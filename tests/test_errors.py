"""Promise 4: nothing in silence. Every wrong request is one clear error, and leaves everything as it was."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, same, snapshot
from visadapt import Bottleneck, VisadaptError
from visadapt.errors import nearest


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with files that are not what they should be."""
    folder = tmp_path_factory.mktemp("files")
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="flowers")
    visadapt.save(model, "flowers", folder / "flowers.visadapt")
    (folder / "empty.visadapt").touch()
    torch.save({"a": torch.ones(2)}, folder / "pickle.visadapt")
    save_file({"a": torch.ones(2)}, folder / "other.visadapt")
    save_file({"a": torch.ones(2)}, folder / "broken.visadapt", {"visadapt": "{"})
    return folder


@pytest.fixture(scope="module")
def injected() -> nn.Module:
    """A model with a task, which no wrong request may change."""
    model = ZOO["tiny/resnet"].make()
    return visadapt.inject(model, m=2, task="flowers", where="layer1", num_classes=3, norms="full")


def full() -> nn.Module:
    return visadapt.inject(ZOO["tiny/resnet"].make(), visadapt.Full(), task="all")


def inject(**request):
    return lambda model, place: visadapt.inject(model, **{"m": 2, "task": "birds", **request})


def plain(**request):
    return lambda model, place: visadapt.inject(ZOO["tiny/resnet"].make(), **{"m": 2, **request})


def load(name, **options):
    return lambda model, place: visadapt.load(model, place / name, **options)


WRONG = {
    # where
    "kind misspelt": (inject(where="conv3x33"), r"where='conv3x33' matches no site.*of ResNet; did you mean 'conv3x3'"),
    "stage misspelt": (inject(where="layr3"), r"where='layr3' matches no site.*did you mean 'layer3'"),
    "host misspelt": (inject(where="layer1.0.bn22"), r"where='layer1\.0\.bn22' .*did you mean 'layer1\.0\.bn2'"),
    "kind of another family": (inject(where="attention"), r"where='attention' matches no site"),
    "kind:host that is none": (inject(where="block:layer9.*"), r"where='block:layer9\.\*' matches no site"),
    "empty string": (inject(where=""), r"where='' matches no site"),
    "depth out of range": (inject(where=8), r"where=8 \(depths run from 0 to 7\) matches no site"),
    "negative depth out of range": (inject(where=-9), r"where=-9 \(depths run from 0 to 7\)"),
    "range out of range": (inject(where=range(8, 12)), r"where=range\(8, 12\) \(depths run from 0 to 7\)"),
    "empty slice": (inject(where=slice(3, 3)), r"where=slice\(3, 3, None\) \(depths"),
    "predicate that is never true": (inject(where=lambda site: False), r"where=predicate '<lambda>' matches no site"),
    "one wrong term of two": (inject(where=["layer2", "layerX"]), r"where='layerX' matches no site"),
    "empty list": (inject(where=[]), r"where= must be a kind.*got \[\]"),
    "a float": (inject(where=2.5), r"where= must be a kind.*got 2\.5"),
    "a bool": (inject(where=True), r"where= must hold kinds.*got True"),
    "a float in a list": (inject(where=[0.5]), r"where= must hold kinds.*got 0\.5"),
    "sites() too": (lambda model, place: visadapt.sites(model, "layr3"), r"where='layr3' matches no site"),
    "no site at all": (
        lambda model, place: visadapt.inject(nn.Sequential(nn.Flatten()), m=2),
        r"Sequential.*(no site|does not run)",
    ),
    # method and its options
    "method misspelt": (inject(method="Botleneck", m=None), r"no method 'Botleneck'; did you mean 'Bottleneck'"),
    "method of another kind": (inject(method=3, m=None), r"method must be one of Bottleneck.*got 3"),
    "m is zero": (inject(m=0), r"m must be a positive integer, or a fraction.*got 0"),
    "m is one point five": (inject(m=1.5), r"m must be a positive integer, or a fraction.*got 1\.5"),
    "m is negative": (inject(m=-0.1), r"m must be a positive integer, or a fraction.*got -0\.1"),
    "m is a string": (inject(m="8"), r"m must be a positive integer, or a fraction.*got '8'"),
    "m and budget": (inject(budget=0.1), r"give m= or budget=, not both"),
    "budget above one": (inject(m=None, budget=2.0), r"budget must be a fraction.*\(0, 1\), got 2\.0"),
    "budget in per cent": (inject(m=None, budget=3), r"budget must be a fraction.*got 3"),
    "budget too small": (
        inject(m=None, budget=1e-6, norms="frozen"),
        r"budget=1e-06 allows 0 parameters, but m=1 already takes [\d,]+",
    ),
    "budget that the norms eat": (
        inject(m=None, budget=0.001),
        r"m=1 already takes [\d,]+ \([\d,]+ of them the norms: norms='frozen' saves these\)",
    ),
    "depthwise on tokens": (
        lambda model, place: visadapt.inject(ZOO["transformers/bert"].make(), Bottleneck(m=2, depthwise=True)),
        r"depthwise=True needs feature maps; attention:bert\.encoder",
    ),
    # task, head, norms
    "task with a dot": (inject(task="a.b"), r"a task's name must be made of letters.*got 'a\.b'"),
    "task without a name": (inject(task=""), r"a task's name must be made of letters.*got ''"),
    "task is no string": (inject(task=None), r"a task's name must be made of letters.*got None"),
    "task named as torch names things": (inject(task="keys"), r"a task cannot be named 'keys'"),
    "task named as a mode": (inject(task="training"), r"a task cannot be named 'training'"),
    "task that is there, other norms": (inject(task="flowers", where=5), r"task 'flowers' has norms='full' already"),
    "task that is there, other head": (
        inject(task="flowers", where=5, norms="full", num_classes=4),
        r"task 'flowers' has its head already \(new, 3 classes\)",
    ),
    "task that is there, same sites": (
        inject(task="flowers", norms="full", where="layer1"),
        r"task 'flowers' has a bottleneck at block:layer1\.0\.bn2 already",
    ),
    "a method without sites that is there": (
        lambda model, place: visadapt.inject(full(), visadapt.Full(), task="all"),
        r"task 'all' has a full already: name another task",
    ),
    "norms misspelt": (inject(norms="afine"), r"no norm policy 'afine'; did you mean 'affine'"),
    "norms is None": (inject(norms=None), r"no norm policy None"),
    "head misspelt": (inject(head="copied"), r"no head policy 'copied'; did you mean 'copy'"),
    "new head without a width": (inject(head="new"), r"head='new' needs num_classes="),
    "copied head with a width": (inject(head="copy", num_classes=3), r"head='copy' keeps the backbone's width"),
    "frozen head with a width": (inject(head="frozen", num_classes=3), r"head='frozen' keeps the backbone's width"),
    "no classes": (inject(num_classes=0), r"num_classes must be a positive integer, got 0"),
    "classes are a float": (inject(num_classes=2.0), r"num_classes must be a positive integer, got 2\.0"),
    "classes are True": (inject(num_classes=True), r"num_classes must be a positive integer, got True"),
    "too few labels": (inject(num_classes=3, labels=["a", "b"]), r"2 labels for a head of 3 classes"),
    "a label twice": (inject(num_classes=3, labels=["a", "b", "a"]), r"labels name 'a' twice"),
    "too few labels for the backbone's head": (inject(labels=["a", "b"]), r"2 labels for a head of 10 classes"),
    "labels are a string": (
        inject(num_classes=3, labels="abc"),
        r"labels must be a list of the classes' names, got 'abc'",
    ),
    "labels are numbers": (
        inject(num_classes=2, labels=[0, 1]),
        r"labels must be a list of the classes' names, got \[0, 1\]",
    ),
    "labels are a number": (inject(num_classes=2, labels=2), r"labels must be a list of the classes' names, got 2"),
    "no head for a width": (
        lambda model, place: visadapt.inject(nn.Sequential(nn.Conv2d(3, 4, 1)), m=1, where="0", num_classes=3),
        r"no head found in Sequential",
    ),
    # the model itself
    "an option misspelt": (inject(num_clases=3), r"inject takes no 'num_clases'; did you mean 'num_classes'"),
    "no model": (lambda model, place: visadapt.inject(5), r"model must be a module, a builder or a name, got int"),
    "a model that was never run": (
        lambda model, place: visadapt.inject(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), m=2),
        r"2 has uninitialised parameters: run the model once, then inject",
    ),
    "a builder of no model": (
        lambda model, place: visadapt.inject(dict),
        r"the builder 'dict' must return a torch\.nn\.Module, got dict",
    ),
    "a name that is none": (lambda model, place: visadapt.inject("resnet"), r"no backbone 'resnet'"),
    "tasks of no model": (
        lambda model, place: visadapt.activate(None, "a"),
        r"model must be a torch\.nn\.Module, got NoneType",
    ),
    "sites of no model": (lambda model, place: visadapt.sites("x"), r"model must be a torch\.nn\.Module, got str"),
    # tasks that are not there
    "activate": (lambda model, place: visadapt.activate(model, "flower"), r"no task 'flower'; did you mean 'flowers'"),
    "activate a number": (lambda model, place: visadapt.activate(model, 1), r"task must be a task's name.*got 1"),
    "using": (lambda model, place: visadapt.using(model, "xyz").__enter__(), r"no task 'xyz'; there is: flowers"),
    "parameters": (lambda model, place: visadapt.parameters(model, "rose"), r"no task 'rose'"),
    "named_parameters": (lambda m, place: list(visadapt.named_parameters(m, "rose")), r"no task 'rose'"),
    "trainable": (lambda model, place: visadapt.trainable(model, ["flowers", "rose"]), r"no task 'rose'"),
    "trainable of nothing": (lambda model, place: visadapt.trainable(model, None), r"no task None; there is: flowers"),
    "unmerge of no model": (
        lambda model, place: visadapt.unmerge(None),
        r"model must be a torch\.nn\.Module, got NoneType",
    ),
    "remove": (lambda model, place: visadapt.remove(model, "rose"), r"no task 'rose'"),
    "save": (lambda model, place: visadapt.save(model, "rose", place / "x"), r"no task 'rose'"),
    "activate a bare model": (
        lambda model, place: visadapt.activate(ZOO["tiny/resnet"].make(), "a"),
        r"this ResNet has no tasks: call visadapt\.inject\(model, …\) first",
    ),
    "eject a bare model": (lambda model, place: visadapt.eject(nn.Linear(1, 1)), r"this Linear has no tasks"),
    "summary of a bare model": (lambda model, place: visadapt.summary(nn.Linear(1, 1)), r"this Linear has no tasks"),
    # files
    "no file": (load("flower.visadapt"), r"no file .*flower\.visadapt; did you mean 'flowers\.visadapt'"),
    "a folder": (load("."), r"must be a task file, got the folder "),
    "an empty file": (load("empty.visadapt"), r"empty\.visadapt is not a whole task file"),
    "a pickle": (load("pickle.visadapt"), r"pickle\.visadapt is not a whole task file"),
    "another safetensors file": (
        load("other.visadapt"),
        r"other\.visadapt is not a task file",
    ),
    "a broken description": (load("broken.visadapt"), r"broken\.visadapt is not a whole task file"),
    "a task that is there": (
        load("flowers.visadapt"),
        r"the model has a task 'flowers' already: .*task='another-name'",
    ),
    "a wrong name": (load("flowers.visadapt", task="a b"), r"a task's name must be made of letters.*got 'a b'"),
    "a wrong check": (load("flowers.visadapt", task="b", check="weight"), r"no check 'weight'; did you mean 'weights'"),
    "a folder that is not there": (
        lambda model, place: visadapt.save(model, "flowers", place / "no" / "x.visadapt"),
        r"cannot write .*x\.visadapt: No such file or directory",
    ),
    "a file that is a folder": (
        lambda model, place: visadapt.save(model, "flowers", place),
        r"cannot write .*: it must be a file, got the folder",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_request_is_an_error_of_its_own_and_changes_nothing(injected, place, case) -> None:
    request, message = WRONG[case]
    state, before, tasks = snapshot(injected), anatomy(injected), visadapt.tasks(injected)
    described, files = repr(tasks), sorted(place.iterdir())
    with pytest.raises(VisadaptError) as raised:
        request(injected, place)
    assert re.search(message, str(raised.value)), str(raised.value)
    assert same(injected.state_dict(), state)
    assert anatomy(injected) == before
    assert repr(visadapt.tasks(injected)) == described
    assert visadapt.active(injected) == "flowers"
    assert sorted(place.iterdir()) == files


@pytest.mark.parametrize(
    "request_",
    [{"where": "layr3"}, {"m": 0}, {"head": "new"}, {"norms": "x"}, {"labels": ["a"], "num_classes": 2}, {"task": "."}],
    ids=str,
)
def test_a_wrong_first_request_leaves_the_model_bare(request_) -> None:
    model = ZOO["tiny/resnet"].make()
    state, before = snapshot(model), anatomy(model)
    with pytest.raises(VisadaptError):
        visadapt.inject(model, **{"m": 2, **request_})
    assert anatomy(model) == before
    assert same(model.state_dict(), state)
    assert visadapt.tasks(model) == {}


def test_the_error_is_a_value_error() -> None:
    assert issubclass(VisadaptError, ValueError)


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("flower", ["flowers", "birds"], "; did you mean 'flowers'?"),
        ("x", [], ""),
        ("zzz", ["a", "b"], "; there is: a, b"),
        ("zzz", [f"n{i:02}" for i in range(14)], "; there is: " + ", ".join(f"n{i:02}" for i in range(12)) + ", …"),
        ("layer", ["layer1", "layer2"], "; did you mean 'layer2' or 'layer1'?"),
    ],
)
def test_hints(name, names, hint) -> None:
    assert nearest(name, names) == hint


@given(name=st.text(max_size=12), names=st.lists(st.text(max_size=12), max_size=20))
def test_a_hint_never_fails_and_never_invents(name, names) -> None:
    hint = nearest(name, names)
    assert bool(hint) == bool(names)
    if name in names and hint.startswith("; did you mean"):
        assert repr(name) in hint


@given(task=st.text(max_size=10) | st.none() | st.integers())
def test_a_task_name_is_taken_or_refused_and_what_is_taken_works(task) -> None:
    try:
        visadapt.inject(NAMED, m=1, task=task, norms="frozen", where=0)
    except VisadaptError:
        assert visadapt.tasks(NAMED) == {"kept": visadapt.tasks(NAMED)["kept"]}
    else:
        assert visadapt.active(NAMED) == task
        visadapt.remove(NAMED, task)


@pytest.mark.parametrize("task", ["visadapt", "default", "0", "a-b_c", "head", "norm", "weight", "bottleneck"])
def test_names_that_might_be_thought_to_clash(task, tmp_path) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=1, task=task, num_classes=2)
    path = visadapt.save(model, task, tmp_path / "file")
    expected = snapshot(model)
    count = visadapt.summary(model).backbone
    visadapt.eject(model)
    visadapt.load(model, path)
    assert same(model.state_dict(), expected)
    assert visadapt.summary(model).backbone == count


NAMED = visadapt.inject(ZOO["tiny/resnet"].make(), m=1, task="kept", where=7)
