"""Own weights stand at the modules that own parameters, and are the task's for whoever reads them."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import visadapt
from tests.models import ZOO, answer, output, short, stir
from tests.versions import compiled_whole
from visadapt import DAN, Biases, Full, TopLayers, VisadaptError, using
from visadapt.methods.own_weights import own_weights


class Reads(nn.Module):
    """Uses parameters of its own and of children that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x) * self.scale, self.read.weight, self.read.bias)


class Lists(nn.Module):
    """Keeps parameters in lists and dicts, and layers in a plain list, a bound method and a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.named = nn.ParameterDict({"a": torch.randn(4)})
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.layers = [[self.first]]
        self.bound = self.second.forward
        self.closed = lambda x: self.third(x)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight) + self.named["a"]
        return self.closed(self.bound(self.layers[0][0](x)))


class Recurrent(nn.Module):
    def __init__(self, make: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = make(4, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Remembers(nn.Module):
    """Sets attributes of itself and of children in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner.last = self.inner(x)
        self.calls = getattr(self, "calls", 0) + 1
        return self.last


def normed(kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight norm is deprecated, and still met
        return nn.Sequential(kind(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "parents that read": Reads,
    "lists": Lists,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attends,
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
    "tied": Tied,
    "remembers": Remembers,
    "nested": lambda: nn.Sequential(Reads(), nn.Sequential(Tied(), Lists())),
    "weight norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "old weight norm": lambda: normed(nn.utils.weight_norm),
    "spectral norm": lambda: normed(nn.utils.spectral_norm),
    "orthogonal": lambda: normed(nn.utils.parametrizations.orthogonal),
}


def injected(name: str, *tasks: str, method: visadapt.Method | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for seed, task in enumerate(tasks or ("a",)):
        visadapt.inject(model, method or Full(), task=task, norms="frozen", head="frozen")
        stir(model, task, seed)
    return model


@torch.no_grad()
def filled(plain: nn.Module, model: nn.Module, task: str) -> nn.Module:
    """A plain model, with the values of a task of another in its parameters."""
    for name, value in visadapt.named_parameters(model, task):
        if name.startswith("full."):
            plain.get_parameter(name.removeprefix("full.")).copy_(value)
    return plain


X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))


def plain_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    # frozen as the injected model is: torch picks other kernels where nothing asks for a gradient
    return MODELS[name]().eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_every_reader_gets_the_tasks_own_values(name) -> None:
    model = injected(name, "a", "b")
    bare = plain_of(name)(X)
    for task in "ab":
        expected = filled(plain_of(name), model, task)(X)
        assert not torch.allclose(expected, bare)
        with using(model, task):
            torch.testing.assert_close(model(X), expected)
            model(X).sum().backward()
        assert all(p.grad is not None for p in visadapt.parameters(model, task))
    with using(model, None):
        assert torch.equal(model(X), bare)
    assert all(p.grad is None for n, p in model.named_parameters() if "visadapt" not in n.split("."))


# a closure keeps the original's layers, and torch copies no tensor that was computed with gradients
UNCOPIED = ("lists", "nested", "old weight norm", "spectral norm")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNCOPIED])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_have_weights_of_their_own(name, how) -> None:
    if how == "pickle" and name in ("weight norm", "orthogonal"):
        return  # torch pickles no parametrised module
    model = injected(name)
    expected = model(X)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    if how == "pickle" or "norm" not in name:
        assert type(copied) is type(model)
    assert torch.equal(copied(X), expected)
    stir(model, "a", seed=7)
    assert torch.equal(copied(X), expected)
    expected = model(X)
    stir(copied, "a", seed=8)
    assert torch.equal(model(X), expected)
    assert not torch.equal(copied(X), expected)


@pytest.mark.parametrize("name", MODELS)
def test_save_load_remove_and_eject(name, tmp_path) -> None:
    model = injected(name, "a", "b")
    with using(model, "a"):
        expected = model(X)
    visadapt.save(model, "a", tmp_path / "a")
    other = plain_of(name)
    visadapt.load(other, tmp_path / "a")
    assert torch.equal(other(X), expected)
    assert [n for n, _ in visadapt.named_parameters(other, "a")] == [
        n for n, _ in visadapt.named_parameters(model, "a")
    ]
    visadapt.remove(model, "b")
    with using(model, "a"):
        assert torch.equal(model(X), expected)
    visadapt.eject(model)
    torch.testing.assert_close(model(X), plain_of(name)(X))
    assert not any(hasattr(type(module), "_visadapt_recipe") for module in model.modules())
    for rnn in (m for m in model.modules() if isinstance(m, nn.RNNBase)):
        assert all(a is b for a, b in zip(rnn._flat_weights, rnn.parameters(), strict=True))


def test_an_lstm_that_moves_while_a_task_is_active_keeps_its_own_weights() -> None:
    model = injected("lstm")
    expected = model(X)
    model.double().float()
    assert torch.equal(model(X), expected)
    model.rnn.weight_hh_l1 = nn.Parameter(model.rnn._parameters["weight_hh_l1"].detach().clone())
    with using(model, None):
        assert torch.equal(model(X), plain_of("lstm")(X))
    visadapt.eject(model)
    with torch.no_grad():
        assert torch.equal(model(X), plain_of("lstm")(X))
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))


def test_tied_weights_are_counted_trained_and_kept_once(tmp_path) -> None:
    model = injected("tied")
    own = visadapt.parameters(model, "a")
    # the bias of the head is the head policy's
    assert sum(p.numel() for p in own) == 16 + 4 == visadapt.summary(model)["a"].adapters
    assert visadapt.summary(model)["a"].bytes == 4 * 20
    visadapt.save(model, "a", tmp_path / "a")
    other = plain_of("tied")
    visadapt.load(other, tmp_path / "a")
    assert len(visadapt.parameters(other, "a")) == 2
    assert other.up.weight is other.down.weight
    assert other.up.weight is visadapt.parameters(other, "a")[0]


def test_what_a_forward_sets_stays_set() -> None:
    model = injected("remembers")
    for calls in (1, 2):
        out = model(X)
        assert model.calls == calls
        assert out is model.last
        assert out is model.inner.last


def test_hooks_parts_of_a_forward_and_children(tiny, image) -> None:
    visadapt.inject(tiny, Full(), num_classes=3, norms="frozen")
    stir(tiny, "default")
    plain = filled(visadapt.eject(copy.deepcopy(tiny)), tiny, "default")
    assert [name for name, _ in tiny.named_children()] == [name for name, _ in plain.named_children()]
    seen: list[Tensor] = []
    handles = [tiny.layer2.register_forward_hook(lambda m, args, out: seen.append(out))]
    handles.append(tiny.layer3[0].conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    tiny(image)
    for handle in handles:
        handle.remove()
    wanted: list[Tensor] = []
    plain.layer2.register_forward_hook(lambda m, args, out: wanted.extend((args[0], out)))
    plain(image)
    assert len(seen) == 2
    assert all(torch.equal(each, wanted[1]) for each in seen)
    # called by itself
    assert torch.equal(tiny.layer2(wanted[0]), wanted[1])


@pytest.mark.parametrize("method", [Full(), TopLayers(1), Biases()], ids=str)
def test_forward_features_are_the_tasks(method) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model.forward_features(x)
    visadapt.inject(model, method, task="a", num_classes=3, norms="frozen")
    stir(model, "a")
    merged = visadapt.merge(model, "a")
    assert not torch.allclose(model.forward_features(x), before)
    torch.testing.assert_close(model.forward_features(x), merged.forward_features(x))
    found, expected = (m.forward_intermediates(x, intermediates_only=True) for m in (model, merged))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", [Full(), TopLayers(1), Biases()], ids=str)
def test_hidden_states_do_not_grow(method) -> None:
    member = ZOO["transformers/bert"]
    model = visadapt.inject(member.make(), method, norms="frozen")
    counts = [len(model(**member.inputs(), output_hidden_states=True).hidden_states) for _ in range(3)]
    assert counts == [3, 3, 3]


def test_feature_lists() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2)).eval()
    x = torch.randn(4, 3, 32, 32)
    expected = {}
    for seed, task in enumerate("ab"):
        visadapt.inject(model, Full(), task=task)
        stir(model, task, seed)
        expected[task] = model(x)
    with using(model, list("abab")):
        found = model(x)
    assert [o.shape for o in found] == [o.shape for o in expected["a"]]
    for level, out in enumerate(found):
        for row, task in enumerate("abab"):
            torch.testing.assert_close(out[row], expected[task][level][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [Full(), Biases()], ids=str)
def test_mixed_batches(name, method) -> None:
    if isinstance(method, Biases) and name in ("lstm", "gru", "rnn"):
        return  # torch calls their biases bias_hh_l0, which are none by name
    model = injected(name, "a", "b", method=method)
    tasks = ["b", None, "a", "a", "b", "a"]
    if name in ("lists", "nested"):
        # a closure over layers is another model's in any copy: whose rows are whose cannot be tried out on one
        with pytest.raises(VisadaptError, match="outside of the model's own forward"), using(model, tasks):
            model(X)
        return
    for training in (False, True):
        if training and name == "spectral norm":
            continue  # its vectors move in every forward
        model.train(training)
        with torch.no_grad(), using(model, tasks):
            found = model(X)
        for row, task in enumerate(tasks):
            with torch.no_grad(), using(model, task):
                torch.testing.assert_close(found[row], model(X[row : row + 1])[0])


@dataclass(frozen=True)
class Alone(Full):
    """Own weights of one module only."""

    at: str = ""

    def parts(self, backbone, sites, task):
        return own_weights(backbone, task, self.at, lambda path, name: True)


def test_a_weight_that_is_used_without_a_call_in_a_mixed_batch() -> None:
    model = nn.Sequential(MODELS["parents that read"]()).eval()
    # only the child that is never called has weights of its own: the model runs one task at a time
    for seed, task in enumerate("ab"):
        visadapt.inject(model, Alone("0.read"), task=task, norms="frozen")
        stir(model, task, seed)
    expected = {task: answer(model, {"input": X}, task) for task in ("a", "b", None)}
    assert not torch.equal(expected["a"], expected[None])
    tasks = ["a", None, "b", "a", "b", "b"]
    for training in (True, False):
        with using(model.train(training), tasks):
            found = model(X)
        for row, task in enumerate(tasks):
            torch.testing.assert_close(found[row], expected[task][row])
    with using(model, tasks):
        weight = model[0].read.weight
        assert (weight.dtype, weight.device.type, weight.shape, weight.dim()) == (torch.float32, "cpu", (4, 4), 2)
        with pytest.raises(VisadaptError, match="weight of a Linear was used without calling"):
            F.linear(X, weight)
    with using(model, ["a"] * 6):
        assert torch.equal(model[0].read.weight, visadapt.parameters(model, "a")[0])


@pytest.mark.parametrize("method", [Full(), pytest.param(Biases(), marks=pytest.mark.slow), DAN()], ids=str)
def test_mixed_batches_compile_as_one_graph(image, method) -> None:
    model = short()
    torch._dynamo.reset()  # graphs of other tests count towards the limit
    for seed, task in enumerate("ab"):
        visadapt.inject(model, method, task=task, num_classes=3, norms="frozen")
        stir(model, task, seed)
    with torch.no_grad(), using(model, ["b", "a"]):
        expected = model(image)  # which also shows whose rows are whose
        compiled = compiled_whole(copy.deepcopy(model), backend="eager")
    with torch.no_grad(), using(compiled, ["b", "a"]):
        torch.testing.assert_close(compiled(image), expected)
    with torch.no_grad(), using(compiled, "a"):
        torch.testing.assert_close(compiled(image), answer(model, {"x": image}, "a"))


def test_another_threads_compilation_is_not_ours(tiny, image) -> None:
    expected = {}
    for seed, task in enumerate("ab"):
        visadapt.inject(tiny, Full(), task=task, norms="frozen")
        stir(tiny, task, seed)
        expected[task] = answer(tiny, {"x": image}, task)
    wrong: list[str] = []
    rounds: list[str] = []
    done = threading.Event()

    def serve(task: str) -> None:
        with torch.no_grad(), using(tiny, task):
            while not done.is_set():
                rounds.append(task)
                if not torch.equal(output(tiny, {"x": image}), expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in "ab"]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        torch.compile(ZOO["tiny/vgg_bn"].make(), backend="aot_eager")(image)
    done.set()
    for thread in threads:
        thread.join()
    assert set(rounds) == {"a", "b"}
    assert not wrong


def test_weights_that_cannot_be_trained_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(VisadaptError, match=r"0\.weight cannot be trained: it is kept in torch\.int8"):
        visadapt.inject(model, Full(), head="frozen")
    assert not visadapt.tasks(model)


def test_a_norm_with_biases_of_one_task_beside_anothers_own_norm() -> None:
    member = ZOO["transformers/bert"]
    model = member.make()
    visadapt.inject(model, Biases(), task="a", norms="frozen", num_classes=3)
    visadapt.inject(model, visadapt.Norms(), task="b", norms="affine", num_classes=3)
    for seed, task in enumerate("ab"):
        stir(model, task, seed)
    inputs = member.inputs(n=4)
    for tasks in (["a", "b", None, "a"], ["b", None, None, "b"]):
        with torch.no_grad(), using(model, tasks):
            found = output(model, inputs)
        for row, task in enumerate(tasks):
            alone = answer(model, {k: v[row : row + 1] for k, v in inputs.items()}, task)[0]
            torch.testing.assert_close(found[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


class Keeps(nn.Module):
    """Computes a bias from its table once in eval mode, as LeViT's and EfficientFormer's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.ones(3)), nn.Linear(4, 4)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        if self.kept:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.fc(x) + self.table[[0, 1, 2, 0]]
        if "bias" not in self.kept:
            self.kept["bias"] = self.table[[0, 1, 2, 0]]
        return self.fc(x) + self.kept["bias"]


@torch.no_grad()
def test_what_a_module_keeps_of_its_weights_is_of_one_task() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Keeps()).eval()
    x = torch.randn(6, 4)
    bare = model(x)
    tasks = ["a", "b", "c"]
    for seed, task in enumerate(tasks):
        method = visadapt.Bottleneck(m=1) if task == "c" else Full()
        visadapt.inject(model, method, task=task, norms="frozen", head="frozen", where="0" if task == "c" else None)
        stir(model, task, seed)

    def alone() -> list[Tensor]:
        return [answered(model, task, x) for task in (None, *tasks)]

    model.train()
    expected = alone()
    model.eval()
    for _ in range(2):
        assert all(map(torch.equal, alone(), expected))
        with using(model, ["a", "b", "c", None, "b", "a"]):
            rows = [expected[k][i] for i, k in enumerate((1, 2, 3, 0, 2, 1))]
            torch.testing.assert_close(model(x), torch.stack(rows))
    stir(model, "a", 7)
    model.train()
    expected[1] = answered(model, "a", x)
    for each in (copy.deepcopy(model), model):
        assert torch.equal(answered(each.eval(), "a", x), expected[1])
    stir(model, "b", 8)  # no change of the mode empties b's table
    expected[2] = answered(copy.deepcopy(model).train(), "b", x)
    compiled = torch.compile(model, backend="eager")
    for task, each in zip((None, *tasks), expected, strict=True):
        with using(model, task):
            torch.testing.assert_close(compiled(x), each)
    visadapt.eject(model)
    assert torch.equal(model(x), bare)


def answered(model: nn.Module, task: str | None, x: Tensor) -> Tensor:
    with using(model, task):
        answer: Tensor = model(x)
    return answer


def pair() -> tuple[nn.Module, Tensor]:
    """A backbone with a task of own weights, and one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    for seed, (task, method) in enumerate({"own": Full(), "other": visadapt.Bottleneck(m=1)}.items()):
        visadapt.inject(model, method, task=task, norms="frozen", head="frozen", where=None if seed == 0 else "2")
        stir(model, task, seed)
    return model, torch.randn(5, 4)


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


ON: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "old weight norm": old_weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", ON)
def test_a_weight_that_a_task_owns_is_not_replaced(kind) -> None:
    model, x = pair()
    visadapt.activate(model, "own")
    with pytest.raises(VisadaptError, match=r"0\.weight cannot be pruned.* task 'own' has a value of its own"):
        ON[kind](model[0])
    if kind in ("prune", "weight norm", "spectral norm"):
        # these say what they want before they change anything
        fresh, _ = pair()
        for task in (None, "own", "other"):
            assert torch.equal(answered(model, task, x), answered(fresh, task, x))


@pytest.mark.parametrize("kind", ["prune", "old weight norm"])
@pytest.mark.parametrize("active", [None, "own"])
def test_what_was_put_on_before_inject_is_not_taken_off_weights_that_a_task_owns(kind, active) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    ON[kind](model[0])
    visadapt.inject(model, Full(), task="own", norms="frozen", head="frozen")
    stir(model, "own", 0)
    visadapt.activate(model, active)

    def take_off() -> None:
        prune.remove(model[0], "weight") if kind == "prune" else nn.utils.remove_weight_norm(model[0])
        model(torch.randn(5, 4))

    with pytest.raises(VisadaptError, match=r"0\.weight_(orig|g) cannot be"):
        take_off()


def test_pruning_the_backbone_leaves_weights_that_a_task_owns() -> None:
    model, x = pair()
    before = {task: answered(model, task, x) for task in (None, "own", "other")}
    with using(model, None):
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    for remove in (False, True):
        if remove:
            prune.remove(model[0], "weight")
        after = {task: answered(model, task, x) for task in before}
        assert torch.equal(after["own"], before["own"])
        assert not torch.equal(after["other"], before["other"])
    visadapt.eject(model)
    assert int((model[0].weight == 0).sum()) == 8
