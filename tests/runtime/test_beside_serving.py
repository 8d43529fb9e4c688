"""Promise 7: a model that serves is never disturbed, whatever comes, goes, is saved, decided or trained beside it."""

import copy
import os
import sys
import threading
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

import visadapt
from tests.models import ZOO, answer, every_module, stir
from visadapt import VisadaptError
from visadapt.backbone.structure import STRUCTURE
from visadapt.runtime.selection import bare
from visadapt.training import Recipe, evaluate, fit, predict
from visadapt.training.engine import channels_last

SECONDS = float(os.environ.get("VISADAPT_STRESS_SECONDS", "3"))
"""How long the stress test lasts; set it to 60 for the long run."""


def build(norms="full"):
    """A model that serves tasks a and b, each with norms of its own, and a decider between them."""
    model = ZOO["tiny/resnet"].make().eval()
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=2, task=task, norms=norms, num_classes=3 + seed)
        stir(model, task, seed)
    return model.eval()


class Together:
    """Threads that call functions again and again until the time is up or one of them fails."""

    def __init__(self, seconds):
        self.end, self.errors, self.calls = time.monotonic() + seconds, [], {}

    def loop(self, name, function):
        self.calls[name] = 0
        try:
            while time.monotonic() < self.end and not self.errors:
                function()
                self.calls[name] += 1
        except BaseException as error:
            self.errors.append((name, error))

    def run(self, **functions):
        threads = [threading.Thread(target=self.loop, args=each) for each in functions.items()]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        for name, error in self.errors:
            raise AssertionError(f"{name} failed") from error
        assert all(self.calls.values()), self.calls


@torch.no_grad()
def test_eight_threads_serve_while_tasks_come_and_go(tmp_path) -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    visadapt.fit_decider(model, {"a": [torch.randn(8, 3, 16, 16)], "b": [torch.randn(8, 3, 16, 16) * 3 + 2]})
    for name in ("came", "gone"):
        visadapt.inject(model, m=2, task=name, norms="affine", num_classes=2)
        stir(model, name, 7)
        visadapt.save(model, name, tmp_path / name)
    visadapt.remove(model, "came")
    visadapt.activate(model, "a")
    images = {"a": x, "b": x, None: x}
    expected = {task: answer(model, {"x": x}, task) for task in images}
    choice = visadapt.decide(model, x)
    chosen = torch.cat([answer(model, {"x": x[i : i + 1]}, task) for i, task in enumerate(choice)])

    def serve(task):
        def once():
            with torch.no_grad(), visadapt.using(model, task):
                assert torch.equal(model(x), expected[task])
                assert visadapt.active(model) == task

        return once

    def serve_mixed():
        with torch.no_grad(), visadapt.using(model, ["b", "a"]):
            out = model(x)
        torch.testing.assert_close(out[0], expected["b"][0])
        torch.testing.assert_close(out[1, :3], expected["a"][1])

    def serve_default():
        with torch.no_grad():
            assert torch.equal(model(x), expected["a"])

    def serve_auto():
        with torch.no_grad(), visadapt.using(model, "auto"):
            torch.testing.assert_close(model(x), chosen)

    def load():
        visadapt.load(model, tmp_path / "came")
        visadapt.remove(model, "came")

    def remove():
        visadapt.remove(model, "gone")
        visadapt.load(model, tmp_path / "gone")

    def save():
        visadapt.save(model, "a", tmp_path / "a")
        visadapt.summary(model)
        model.state_dict()

    def decide():
        assert visadapt.decide(model, x) == choice

    Together(SECONDS).run(
        first=serve("a"), second=serve("b"), third=serve(None), fourth=serve("a"), fifth=serve("b"),
        sixth=serve_mixed, seventh=serve_default, eighth=serve_auto,
        loader=load, remover=remove, saver=save, decider=decide,
    )  # fmt: skip
    for task in images:
        assert torch.equal(answer(model, {"x": x}, task), expected[task])


def test_a_task_is_trained_beside_serving() -> None:
    """The others answer as ever, and training comes to the same as alone."""
    images, labels, x = torch.randn(32, 3, 16, 16), torch.randint(0, 4, (32,)), torch.randn(2, 3, 16, 16)
    alone, model = build(), build()
    expected = answer(model, {"x": x}, "a")
    recipe = Recipe(epochs=2, batch_size=16)
    fit(alone, "b", (images, labels), recipe=recipe, prepare=lambda v: v, progress=False)

    done = threading.Event()
    answers = []

    def serve():
        while not done.is_set():
            with torch.no_grad(), visadapt.using(model, "a"):
                answers.append(torch.equal(model(x), expected))

    thread = threading.Thread(target=serve)
    thread.start()
    fit(model, "b", (images, labels), recipe=recipe, prepare=lambda v: v, progress=False)
    done.set()
    thread.join()
    assert answers
    assert all(answers)
    assert torch.equal(answer(model, {"x": x}, "a"), expected)
    assert torch.equal(answer(model, {"x": x}, "b"), answer(alone, {"x": x}, "b"))
    assert not torch.equal(answer(build(), {"x": x}, "b"), answer(alone, {"x": x}, "b"))
    assert not model.training


def test_two_training_runs_in_two_threads_are_refused() -> None:
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 3, (8,))
    model, errors = build(), []

    def second():
        with pytest.raises(VisadaptError, match="another thread of this process is in fit") as caught:
            fit(model, "b", (images, labels), recipe=Recipe(epochs=1, batch_size=8), progress=False)
        errors.append(caught.value)

    def log(_):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    fit(
        model,
        "a",
        (images, labels),
        recipe=Recipe(epochs=1, batch_size=8),
        prepare=lambda v: v,
        progress=False,
        log=log,
    )
    assert len(errors) == 1
    fit(model, "b", (images, labels), recipe=Recipe(epochs=1, batch_size=8), prepare=lambda v: v, progress=False)


def test_loading_does_not_change_what_other_threads_mean(tmp_path) -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    visadapt.save(model, "b", tmp_path / "b")
    visadapt.remove(model, "b")
    visadapt.activate(model, "a")
    seen = []

    def load():
        visadapt.load(model, tmp_path / "b")
        seen.append(visadapt.active(model))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert seen == ["b"]
    assert visadapt.active(model) == "a"
    with visadapt.using(model, None):
        visadapt.inject(model, m=2, task="c")
        assert visadapt.active(model) is None
    assert answer(model, {"x": x}, "b").shape == (2, 4)


def test_deciding_hooks_nothing() -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    visadapt.fit_decider(model, {"a": [x], "b": [x + 1]})
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.layer1.register_forward_hook(lambda *_: seen.append(None))
    visadapt.decide(model, x)
    assert not seen
    assert {name: module.training for name, module in model.named_modules()} == modes
    # its copy of the backbone follows the model
    model.double()
    assert len(visadapt.decide(model, x.double())) == 2


def test_merging_changes_no_mode_and_hooks_nothing() -> None:
    model = ZOO["tiny/resnet"].make()
    visadapt.inject(model, visadapt.LoRA(r=2), task="a", num_classes=3, where="conv3x3")
    stir(model, "a")
    model.train()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    changed = []

    class Watched(type(model)):
        def __setattr__(self, name, value):
            changed.append((self, name))
            super().__setattr__(name, value)

    model.__class__ = Watched
    visadapt.merge(model, "a")
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert model.training
    assert changed
    assert not any(name == "training" for module, name in changed if module is model)


def test_modes_are_changed_for_one_thread_alone() -> None:
    model, x = ZOO["tiny/resnet"].make(), ZOO["tiny/resnet"].inputs()["x"]
    visadapt.inject(model, m=3, task="a", num_classes=3)
    errors: list[str] = []

    def forward() -> None:
        try:
            with visadapt.using(model, "a"):
                model(x)
        except VisadaptError as error:
            errors.append(str(error))

    def elsewhere() -> None:
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    modes = [module.training for module in model.train().modules()]
    with bare(model):
        assert not model.training
        elsewhere()
        with bare(model):
            model(x)
    assert len(errors) == 1
    assert "another thread has put this model into modes" in errors[0]
    assert modes == [module.training for module in model.modules()]
    elsewhere()
    with bare(model.eval()):
        elsewhere()
    assert len(errors) == 1


class Writes(TorchFunctionMode):
    """Notes what is written to the tensors of a model, also what changes no value: torch is not safe against either."""

    def __init__(self, model):
        super().__init__()
        self.names = {
            id(tensor): f"{path}.{name}"
            for path, module in every_module(model).items()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        own = getattr(function, "__name__", "")
        if args and id(args[0]) in self.names and (own == "__set__" or (own.endswith("_") and not own.endswith("__"))):
            self.seen.add(self.names[id(args[0])])
        return function(*args, **(kwargs or {}))


def test_nothing_is_written_to_the_tensors_that_other_threads_read(tmp_path) -> None:
    model = build()
    visadapt.inject(model, m=2, task="late", where="layer4", norms="frozen", num_classes=3)
    images, labels, recipe = torch.randn(8, 3, 16, 16), torch.randint(0, 3, (8,)), Recipe(epochs=1, batch_size=8)
    samples, data = {"a": [images], "b": [images + 1]}, (images, labels)
    visadapt.save(model, "b", tmp_path / "b")
    calls = {
        "evaluate": lambda: evaluate(model, "a", data),
        "training.predict": lambda: predict(model, "a", images),
        "predict": lambda: visadapt.predict(model, images, "b"),
        "fit": lambda: fit(model, "b", data, validation=data, recipe=recipe, progress=False),
        "save": lambda: visadapt.save(model, "a", tmp_path / "a"),
        "load": lambda: visadapt.load(model, tmp_path / "b", task="other"),
        "combine": lambda: visadapt.combine(model, {"b": 0.5, "other": 0.5}, into="both"),
        "remove": lambda: visadapt.remove(model, "other"),
        "fit_decider": lambda: visadapt.fit_decider(model, samples, steps=1),
        "decide": lambda: visadapt.decide(model, images),
        "cache_prefix": lambda: visadapt.cache_prefix(model, "late", images).prefix.close(),
        "copy": lambda: copy.deepcopy(model).train().zero_grad(),
        "summary": lambda: (visadapt.summary(model), visadapt.sites(model), model.state_dict()),
    }
    # as a recipe that is fast does, once the weights are in its format
    model.to(memory_format=torch.channels_last)
    calls["channels_last"] = lambda: channels_last(model)
    for name, call in calls.items():
        with Writes(model) as writes:
            call()
        trained = {path for path in writes.seen if name == "fit" and ".b." in path}
        assert writes.seen == trained, name


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_waits_until_no_thread_changes_a_model() -> None:
    held = threading.Event()

    def change() -> None:
        with STRUCTURE:
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=change)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        os._exit(0 if STRUCTURE.acquire(timeout=5) else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert STRUCTURE.acquire(timeout=5)
    STRUCTURE.release()


def test_training_is_refused_in_a_process_without_gradients(monkeypatch) -> None:
    model = ZOO["tiny/resnet"].make()
    for task in ("a", "b"):
        visadapt.inject(model, m=2, task=task, num_classes=3)
    images = torch.randn(2, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # as in a fork of a process in which gradients of fake tensors were computed
    def backward(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(VisadaptError, match=r"fit\(\) needs gradients"):
        fit(model, "a", (images, torch.tensor([0, 1])), progress=False)
    with pytest.raises(VisadaptError, match=r"fit_decider\(\) needs gradients"):
        visadapt.fit_decider(model, {"a": [images], "b": [images]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
