"""The decider tells from the bare backbone's features which task an unlabelled input belongs to."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

import visadapt
from visadapt import VisadaptError
from visadapt.data import load_images, normalize
from visadapt.runtime.decider import KIND
from visadapt.tensor_file import read_described, write_described

KINDS = ("cifar10", "mnist", "fashion-mnist")


@pytest.fixture(scope="module")
def images():
    sets = {name.replace("-", "_"): load_images(name) for name in KINDS}
    return {name: normalize(found.train.images[:60], 32) for name, found in sets.items()}


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for width, task in enumerate(images, start=3):
        visadapt.inject(model, m=2, task=task, num_classes=width)
        with torch.no_grad():
            for parameter in visadapt.parameters(model, task):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture
def decided(model, images):
    visadapt.fit_decider(model, {task: [x[:20], x[20:40]] for task, x in images.items()})
    return model


def held_out(images):
    names = [task for task in images for _ in range(20)]
    return torch.cat([x[40:] for x in images.values()]), names


def test_it_tells_real_images_apart(decided, images):
    x, names = held_out(images)
    found = visadapt.decide(decided, x)
    # random weights see more than chance's third; the data sets differ in plain ways
    assert sum(a == b for a, b in zip(found, names, strict=True)) >= 0.9 * len(names)


@torch.no_grad()
def test_auto_is_the_list_that_it_decides(decided, images):
    x, _ = held_out(images)
    x = x[::7]
    names = visadapt.decide(decided, x)
    with visadapt.using(decided, names):
        expected = decided(x)
    with visadapt.using(decided, "auto"):
        assert torch.equal(decided(x), expected)
        # and each batch is decided anew
        assert torch.equal(decided(x.flip(0)).isinf(), expected.flip(0).isinf())
        assert visadapt.active(decided) == "auto"
    visadapt.activate(decided, "auto")
    assert torch.equal(decided(x), expected)
    visadapt.activate(decided, "mnist")
    assert visadapt.active(decided) == "mnist"
    assert decided(x).shape[1] == 4


def test_it_is_saved_and_loaded(decided, images, tmp_path):
    x, _ = held_out(images)
    expected = visadapt.decide(decided, x)
    path = visadapt.save_decider(decided, tmp_path / "which.safetensors")
    visadapt.fit_decider(decided, {task: [torch.zeros(2, 3, 32, 32)] for task in images})
    visadapt.load_decider(decided, path)
    assert visadapt.decide(decided, x) == expected


def test_its_file_knows_its_backbone_and_is_whole(decided, images, tmp_path):
    path = visadapt.save_decider(decided, tmp_path / "which.safetensors")
    content = read_described(path, KIND, "decider")
    tensors = content.tensors
    for name, message in (("mean", "mean"), ("linear.weight", "linear.weight")):
        left = {key: t for key, t in tensors.items() if key != name}
        write_described(tmp_path / "bad", KIND, content.description, left)
        with pytest.raises(VisadaptError, match=f"(?s)is not a whole decider.*{message}"):
            visadapt.load_decider(decided, tmp_path / "bad")
    for text in ("{", "[]", '{"tasks": 3, "backbone": {}}', '{"tasks": ["mnist"]}'):
        save_file(tensors, tmp_path / "bad", {"visadapt_decider": text})
        with pytest.raises(VisadaptError, match=r"is not a (whole )?decider"):
            visadapt.load_decider(decided, tmp_path / "bad")
    with torch.no_grad():
        decided.layer3[0].conv1.weight += 1e-3
    with pytest.raises(VisadaptError, match=r"fitted on another backbone than this ResNet: other weights in layer3\.0"):
        visadapt.load_decider(decided, path)
    assert visadapt.decide(decided, images["mnist"][:2])


def test_a_backbones_head_has_no_part_in_its_features(decided, tmp_path):
    path = visadapt.save_decider(decided, tmp_path / "which.safetensors")
    with torch.no_grad():
        decided.fc.weight += 1
    visadapt.load_decider(decided, path)


def test_fitting_it_leaves_the_model_and_random_numbers_alone(model, images):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    visadapt.fit_decider(model, {task: [x[:4]] for task, x in images.items()})
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_what_cannot_be_decided_is_refused(model, images, tmp_path):
    x = images["mnist"][:2]
    for call, message in (
        (lambda: visadapt.decide(model, x), "no decider"),
        (lambda: visadapt.activate(model, "auto"), "needs a decider"),
        (lambda: visadapt.save_decider(model, tmp_path / "d"), "no decider"),
        (lambda: visadapt.fit_decider(model, {"mnist": [x]}), "two or more"),
        (lambda: visadapt.fit_decider(model, {"mnist": [x], "minst": [x]}), "did you mean 'mnist'"),
        (lambda: visadapt.fit_decider(model, {"mnist": [x], "cifar10": []}), "no samples of task 'cifar10'"),
        (lambda: visadapt.load_decider(model, tmp_path / "none"), "no file"),
        (
            lambda: visadapt.load_decider(model, visadapt.save(model, "mnist", tmp_path / "t")),
            "is not a (whole )?decider",
        ),
    ):
        with pytest.raises(VisadaptError, match=message):
            call()
    assert visadapt.active(model) == "fashion_mnist"


def test_a_decider_that_names_a_task_that_is_gone_says_so(decided, images):
    visadapt.remove(decided, "mnist")
    with visadapt.using(decided, "auto"), pytest.raises(VisadaptError, match="no task 'mnist'"):
        decided(images["mnist"][:2])
