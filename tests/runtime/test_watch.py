"""Frozen means frozen, whatever moves: weight averaging, conversions, home-made layers with buffers of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import visadapt
from tests.models import answer, bare_part, output, same, snapshot, stir, train
from visadapt import VisadaptError


@pytest.fixture
def two(tiny, image):
    """Task a has statistics of its own, b has the backbone's."""
    for task, norms in (("a", "full"), ("b", "affine")):
        visadapt.inject(tiny, m=2, task=task, norms=norms, num_classes=3)
        train(tiny, task, {"x": image})
    return {task: answer(tiny, {"x": image}, task) for task in (None, "a", "b")}


def moved(model, before):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def lightnings_average(model, images):
    """What Lightning's StochasticWeightAveraging does to norms before it collects their statistics again."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            momenta[module] = module.momentum
            module.momentum = None
            module.num_batches_tracked *= 0
    model.train()
    with torch.no_grad():
        model(images)
    for module, momentum in momenta.items():
        module.momentum = momentum
    model.eval()


def torchs_average(model, images):
    update_bn([images], model)
    model.eval()


@pytest.mark.parametrize("average", [torchs_average, lightnings_average])
@pytest.mark.parametrize("task", ["a", "b", None])
def test_averaging_collects_the_statistics_of_the_task_alone(tiny, image, two, average, task) -> None:
    before = snapshot(tiny)
    with visadapt.using(tiny, task):
        average(tiny, image + 1)
    changed = moved(tiny, before)
    if task == "a":
        assert any("running_mean" in key for key in changed)
        assert all(".visadapt.a.norm." in key for key in changed)
        norm = tiny.bn1._modules["visadapt"]["a"]["norm"]
        with torch.no_grad():
            seen = tiny.conv1(image + 1).mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, seen)
    else:
        # the averages reset the statistics of all norms, and only those that a forward reaches are collected again
        assert all("running" in key or "num_batches" in key for key in changed)
        assert not any(".visadapt.b." in key for key in changed)
    assert not any("visadapt" not in key for key in changed)
    assert torch.equal(answer(tiny, {"x": image}, None), two[None])
    assert torch.equal(answer(tiny, {"x": image}, "b"), two["b"])


def test_an_averaged_model(tiny, image, two) -> None:
    visadapt.activate(tiny, "a")
    averaged = AveragedModel(tiny, use_buffers=True)
    train(tiny, "a", {"x": image})
    averaged.update_parameters(tiny)
    averaged.update_parameters(tiny)
    update_bn([image], averaged)
    assert same(bare_part(snapshot(averaged.module)), bare_part(snapshot(tiny)))


def test_an_average_is_of_the_tasks_that_it_was_made_for(tiny, image) -> None:
    for task in "ab":
        visadapt.inject(tiny, m=2, task=task, num_classes=3)
        stir(tiny, task)
    averages = {}
    for task in "ab":
        visadapt.activate(visadapt.trainable(tiny, task), task)
        averages[task] = AveragedModel(tiny)
        averages[task].update_parameters(tiny)
        mean = [p.detach() / 2 for p in visadapt.parameters(tiny, task)]
        stir(tiny, task, 7)
        mean = [p + q.detach() / 2 for p, q in zip(mean, visadapt.parameters(tiny, task), strict=True)]
        averages[task].update_parameters(tiny)
        for averaged, each in zip(visadapt.parameters(averages[task].module, task), mean, strict=True):
            torch.testing.assert_close(averaged, each)
    before = snapshot(averages["a"])
    with pytest.raises(VisadaptError, match=r"averages task 'a', and the model now uses task 'b'"):
        averages["a"].update_parameters(tiny)
    assert same(snapshot(averages["a"]), before)
    # all else may be done with it
    assert averages["a"].eval()(image).shape == (2, 3)


def test_resets_pass_by_and_other_statistics_are_refused(tiny, image, two) -> None:
    before = snapshot(tiny)
    for module in tiny.modules():
        if isinstance(module, nn.BatchNorm2d) and "visadapt" in module._modules:
            module.reset_running_stats()
            for name in ("running_mean", "running_var"):
                with pytest.raises(VisadaptError, match=f"{name} of a .* belongs to a frozen backbone"):
                    setattr(module, name, getattr(module, name) + 1)
                with pytest.raises(VisadaptError, match="belongs to a frozen backbone"):
                    setattr(module, name, None)
    assert same(snapshot(tiny), before)
    # loaded they are, also by assigning
    other = {key: value + 1 if "running_var" in key else value for key, value in bare_part(before).items()}
    for assign in (False, True):
        tiny.load_state_dict({k: v.clone() for k, v in other.items()}, assign=assign)
        assert same(bare_part(snapshot(tiny)), other)
        tiny.load_state_dict(before, assign=assign)
    visadapt.eject(tiny)
    tiny.bn1.running_mean = torch.ones_like(tiny.bn1.running_mean)
    tiny.bn1.reset_running_stats()
    assert not tiny.bn1.running_mean.any()


@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_a_converted_norm_is_refused_by_name(tiny, image, norms) -> None:
    visadapt.inject(tiny, m=2, task="a", norms=norms, head="frozen")
    nn.SyncBatchNorm.convert_sync_batchnorm(tiny)
    for mode in (True, False):
        with pytest.raises(VisadaptError, match="bn1 was replaced after the inject, by a SyncBatchNorm"):
            tiny.train(mode)(image)
    visadapt.eject(tiny)
    visadapt.inject(tiny, m=2, task="a", norms=norms, head="frozen")
    before = bare_part(snapshot(tiny))
    tiny.eval()(image)
    assert same(bare_part(snapshot(tiny)), before)


def test_a_host_that_moved_into_a_wrapper_goes_on(tiny, image, two) -> None:
    tiny.bn1 = nn.Sequential(tiny.bn1)
    tiny.layer1[0].bn2 = nn.Sequential(tiny.layer1[0].bn2)
    for task, expected in two.items():
        assert torch.equal(answer(tiny, {"x": image}, task), expected)


@pytest.mark.parametrize("copied", [False, True])
def test_a_host_that_went_with_the_module_around_it_is_refused(tiny, image, two, copied) -> None:
    """As with reparameterize_model, fuse and prune_intermediate_layers of timm, the first of which copies the model."""
    model = copy.deepcopy(tiny) if copied else tiny
    layer = model.layer1
    model.layer1 = nn.Identity()
    with pytest.raises(VisadaptError, match=r"layer1\S* was (replaced|removed) after the inject"):
        model(image)
    model.layer1 = nn.Sequential(*layer)
    for task, expected in two.items():
        assert torch.equal(answer(model, {"x": image}, task), expected)


class Layer(nn.Module):
    """A layer with state of its own."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.register_buffer("state", torch.full((3,), 0.5))
        self.register_buffer("index", torch.arange(3))

    def forward(self, x):
        if self.training:
            self.move(x)
        return self.drop(x) * self.state[self.index].view(1, 3, 1, 1)


class InPlace(Layer):
    def move(self, x):
        self.state.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))


class Assigned(Layer):
    def move(self, x):
        self.state = 0.9 * self.state + 0.1 * x.detach().mean((0, 2, 3))


class ByData(Layer):
    def move(self, x):
        self.state.data.copy_(x.detach().mean((0, 2, 3)))
        self.state[0] += 1


class Untraced(Layer):
    """Moves by ways that torch does not count: in another memory, and behind autograd's back."""

    def move(self, x):
        self.state.data = 0.9 * self.state + 0.1 * x.detach().mean((0, 2, 3))
        self.state.data.mul_(0.9)


class Behind(Layer):
    def move(self, x):
        self.state.data.mul_(0.9)


class Momentum(Layer):
    """Follows another weight in its forward, as MoCo's encoder of keys does."""

    def __init__(self):
        super().__init__()
        self.follower = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)

    def forward(self, x):
        self.follower.data = 0.9 * self.follower.data + 0.1 * self.state
        return self.drop(x) * self.follower.view(1, 3, 1, 1)


class Always(Layer):
    def forward(self, x):
        with torch.no_grad():
            self.state += 0.1
        return x * self.state.mean()


class Late(Layer):
    """Moves once it has been called a few times."""

    calls = 0

    def move(self, x):
        self.calls += 1
        if self.calls > 2:
            self.state.copy_(x.detach().mean((0, 2, 3)))


class Sized(Layer):
    """Keeps a table for the size of its last input, as timm's ConViT does."""

    def forward(self, x):
        if self.state.shape != x.shape[2:]:
            self.state = torch.linspace(0.5, 1.5, x[0, 0].numel()).view(x.shape[2:])
        return self.drop(x) * self.state


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.randn(4, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)


class Parent(nn.Module):
    """Moves what its child holds."""

    def __init__(self):
        super().__init__()
        self.book = Codebook()

    def forward(self, x):
        if self.training:
            self.book.count += 1
            self.book.state[self.book.count % 4] = x.detach().mean((0, 2, 3))
        return x + self.book.state.mean(0).view(1, 3, 1, 1)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.net(self.layer(x)).flatten(1))


LAYERS = [InPlace, Assigned, ByData, Untraced, Behind, Momentum, Always, Late, Sized, Parent]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norms", ["frozen", "full"])
def test_home_made_layers_stand_still(layer, norms) -> None:
    torch.manual_seed(0)
    model, x = Net(layer).eval(), torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for task in "ab":
        visadapt.inject(model, visadapt.Parallel(), task=task, norms=norms, num_classes=3, where="net.0", example=x)
    train(model, "a", {"x": x}, steps=5)
    first = answer(model, {"x": x}, "a")
    train(model, "b", {"x": x + 1}, steps=5)
    assert torch.equal(answer(model, {"x": x}, "a"), first)
    assert torch.equal(answer(model, {"x": x}, None), answer(copy.deepcopy(plain), {"x": x}))
    for name, buffer in model.named_buffers():
        if "visadapt" not in name.split("."):
            assert torch.equal(buffer, buffers[name]), name
    twin = copy.deepcopy(model)
    train(twin, "b", {"x": x}, steps=5)
    assert same(bare_part(snapshot(twin)), bare_part(snapshot(model)))
    visadapt.eject(model)
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert torch.equal(answer(model, {"x": x}), answer(copy.deepcopy(plain), {"x": x}))


def test_a_parameter_that_the_forward_changes_in_place_is_refused() -> None:
    """Its old values are gone: nothing could put it back."""
    torch.manual_seed(0)
    model, x = Net(nn.Identity).eval(), torch.randn(4, 3, 8, 8)
    visadapt.inject(model, m=2, example=x, where="net.0")

    def momentum(module, args):
        with torch.no_grad():
            module.weight.mul_(0.9)

    handle = model.fc.register_forward_pre_hook(momentum)
    with pytest.raises(VisadaptError, match=r"the forward wrote to the parameter fc\.weight, which is frozen"):
        model(x)
    handle.remove()
    with torch.no_grad():
        model.fc.weight.mul_(0.9)
    model(x)


def test_drop_out_is_not_state() -> None:
    torch.manual_seed(0)
    model, x = Net(Layer).eval(), torch.randn(4, 3, 8, 8)
    Layer.move = lambda self, x: None
    visadapt.inject(model, m=2, example=x, where="net.0")
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


def test_what_the_user_changes_between_forwards_stays_changed() -> None:
    torch.manual_seed(0)
    model, x = Net(InPlace).eval(), torch.randn(4, 3, 8, 8)
    visadapt.inject(model, m=2, example=x, where="net.0")
    train(model, "default", {"x": x}, steps=2)
    with torch.no_grad():
        model.layer.state.fill_(2.0)
    train(model, "default", {"x": x}, steps=2)
    assert torch.equal(model.layer.state, torch.full((3,), 2.0))
    model.double()
    train(model, "default", {"x": x.double()}, steps=2)
    assert torch.equal(model.layer.state, torch.full((3,), 2.0).double())
    other = {**bare_part(model.state_dict()), "layer.state": torch.full((3,), 3.0).double()}
    model.load_state_dict(other)
    train(model, "default", {"x": x.double()}, steps=2)
    assert torch.equal(model.layer.state, torch.full((3,), 3.0).double())


def test_a_batch_norm_without_statistics(image) -> None:
    """It uses its batch's in every mode: nothing of it moves, for any task."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    plain = copy.deepcopy(model)
    for task, norms in (("a", "affine"), ("b", "full")):
        visadapt.inject(model, m=2, task=task, norms=norms, example=image, where="0")
        train(model, task, {"x": image})
    assert torch.equal(answer(model, {"x": image}, None), answer(plain, {"x": image}))
    assert torch.equal(output(model.train(), {"x": image}), output(model.eval(), {"x": image}))
