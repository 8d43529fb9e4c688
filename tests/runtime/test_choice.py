"""The task meant is what was chosen where a forward began: in generators, threads, async tasks, and in backward."""

import asyncio
import contextlib
import copy
import gc
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visadapt
from tests.models import ZOO, answer, output, stir
from visadapt import Bottleneck, VisadaptError


@pytest.fixture
def answers(tiny, image):
    """A model whose tasks a and b answer each in its own way; b is active."""
    for seed, task in enumerate("ab"):
        visadapt.inject(tiny, m=2, task=task, norms="frozen", num_classes=3)
        stir(tiny, task, seed)
    return {task: answer(tiny, {"x": image}, task) for task in (None, "a", "b")}


def meant(model, image, answers):
    """The task that a forward performs here, which has to be what ``active`` says."""
    with torch.no_grad():
        out = model(image)
    (task,) = (task for task, expected in answers.items() if torch.equal(expected, out))
    assert visadapt.active(model) == task
    return task


def elsewhere(function):
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def stream(model, image, answers, task):
    with visadapt.using(model, task):
        while True:
            yield meant(model, image, answers)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_generators_in_turn(tiny, image, answers, order) -> None:
    a, b = (stream(tiny, image, answers, task) for task in "ab")
    assert [next(each) for each in (a, b, a, a, b)] == ["a", "b", "a", "a", "b"]
    for first in order:
        (a if first == "a" else b).close()
        with visadapt.using(tiny, None):
            assert meant(tiny, image, answers) is None
    assert meant(tiny, image, answers) == "b"
    visadapt.activate(tiny, "a")
    assert meant(tiny, image, answers) == "a"


def test_a_block_around_a_generator_is_not_the_generators(tiny, image, answers) -> None:
    with visadapt.using(tiny, None):
        a = stream(tiny, image, answers, "a")
        for _ in range(3):
            assert next(a) == "a"
            assert meant(tiny, image, answers) is None
            with visadapt.using(tiny, "b"):
                assert next(a) == "a"
                assert meant(tiny, image, answers) == "b"
        a.close()
        assert meant(tiny, image, answers) is None


def test_outside_of_a_generator_that_waits_it_has_to_be_said(tiny, image, answers) -> None:
    a = stream(tiny, image, answers, "a")
    next(a)
    with pytest.raises(VisadaptError, match=r"a generator waits inside using\(model, 'a'\)"):
        visadapt.active(tiny)
    with pytest.raises(VisadaptError, match="a generator waits"):
        tiny(image)
    # no doubt where both are the same
    visadapt.activate(tiny, "a")
    assert meant(tiny, image, answers) == "a"
    visadapt.activate(tiny, "b")
    del a
    gc.collect()
    assert meant(tiny, image, answers) == "b"


def test_a_generator_that_is_a_context_manager_is_for_its_block(tiny, image, answers) -> None:
    @contextlib.contextmanager
    def choosing(task):
        with visadapt.using(tiny, task):
            yield

    @contextlib.contextmanager
    def twice(task):
        with choosing(None), choosing(task):
            yield

    with visadapt.using(tiny, None):
        with choosing("a"):
            assert meant(tiny, image, answers) == "a"
            with twice("b"):
                assert meant(tiny, image, answers) == "b"
            assert meant(tiny, image, answers) == "a"
        assert meant(tiny, image, answers) is None
    with contextlib.ExitStack() as stack:
        stack.enter_context(twice("a"))
        assert meant(tiny, image, answers) == "a"
        stack.enter_context(visadapt.using(tiny, None))
        assert meant(tiny, image, answers) is None

    def inner():
        with choosing("a"):
            while True:
                yield meant(tiny, image, answers)

    generator = inner()
    with visadapt.using(tiny, "b"):
        assert next(generator) == "a"
        assert meant(tiny, image, answers) == "b"
        assert next(generator) == "a"
        generator.close()


def test_a_generator_closed_in_another_thread_leaves_nothing_behind(tiny, image, answers) -> None:
    a = stream(tiny, image, answers, "a")
    next(a)
    elsewhere(a.close)
    assert meant(tiny, image, answers) == "b"


def test_blocks_left_in_any_order(tiny, image, answers) -> None:
    x, y, z = (visadapt.using(tiny, task) for task in ("a", None, "a"))
    for block in (x, y, z):
        block.__enter__()
    y.__exit__(None, None, None)
    assert meant(tiny, image, answers) == "a"
    x.__exit__(None, None, None)
    assert meant(tiny, image, answers) == "a"
    z.__exit__(None, None, None)
    assert meant(tiny, image, answers) == "b"


def test_async_generators_and_tasks(tiny, image, answers) -> None:
    async def agen(task):
        with visadapt.using(tiny, task):
            while True:
                yield meant(tiny, image, answers)

    async def child():
        found = []
        for _ in range(3):
            await asyncio.sleep(0)
            found.append(meant(tiny, image, answers))
        return found

    async def main():
        a, b = agen("a"), agen("b")
        assert [await anext(each) for each in (a, b, a, b)] == ["a", "b", "a", "b"]
        await a.aclose()
        await b.aclose()
        assert meant(tiny, image, answers) == "b"
        with visadapt.using(tiny, "a"):
            task = asyncio.create_task(child())
        with visadapt.using(tiny, None):
            # a task means what was meant where it was made, and so does a thread of asyncio's
            assert await task == ["a"] * 3
            assert await asyncio.to_thread(meant, tiny, image, answers) is None

    asyncio.run(main())
    assert meant(tiny, image, answers) == "b"


def test_a_thread_started_inside_a_block_has_to_choose(tiny, image, answers) -> None:
    def here():
        return meant(tiny, image, answers)

    def choosing():
        with visadapt.using(tiny, "a"):
            return meant(tiny, image, answers)

    with visadapt.using(tiny, "a"):
        with pytest.raises(VisadaptError, match=r"started inside using\(model, 'a'\) of another thread.* call using"):
            elsewhere(here)
        assert elsewhere(choosing) == "a"
        visadapt.activate(tiny, "a")
        # no doubt where both are the same
        assert elsewhere(here) == "a"
        visadapt.activate(tiny, "b")
        # said since
        assert elsewhere(here) == "b"
    with visadapt.using(tiny, "b"):
        assert elsewhere(here) == "b"
    assert elsewhere(here) == "b"


def test_a_thread_of_a_pool_has_to_choose(tiny, image, answers) -> None:
    def chosen(task):
        with visadapt.using(tiny, task):
            return meant(tiny, image, answers)

    for make in (ThreadPoolExecutor, ThreadPool):
        with make(1) as pool:

            def run(*args, pool=pool):
                if isinstance(pool, ThreadPool):
                    return pool.apply(args[0], args[1:])
                return pool.submit(*args).result()

            with visadapt.using(tiny, "a"):
                assert run(chosen, "a") == "a"
                if make is ThreadPoolExecutor:
                    with pytest.raises(VisadaptError, match="started inside"):
                        run(meant, tiny, image, answers)
            assert run(meant, tiny, image, answers) == "b"


def test_threads_that_others_started_do_not_ask(tiny, image, answers) -> None:
    """A thread that a block has nothing to do with means what was activated."""
    inside, done = threading.Event(), threading.Event()

    def serve():
        with visadapt.using(tiny, "a"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait(60)
    assert elsewhere(lambda: meant(tiny, image, answers)) == "b"
    done.set()
    thread.join()


def replicated(model):
    """A replica as DataParallel makes it, but on the same device."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in made.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else made[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return made[model]


@pytest.mark.parametrize("method", [Bottleneck(m=2), "Full"])
def test_replicas_are_for_the_task_that_was_meant_where_they_were_made(image, method) -> None:
    model = ZOO["tiny/resnet"].make().eval()
    for seed, task in enumerate("ab"):
        visadapt.inject(model, method, task=task, norms="frozen", num_classes=3)
        stir(model, task, seed)
    answers = {task: answer(model, {"x": image}, task) for task in (None, "a", "b")}
    for task in ("a", "b", None):
        with visadapt.using(model, task):
            replica = replicated(model)
            torch.testing.assert_close(elsewhere(lambda replica=replica: replica(image)), answers[task])
        with torch.no_grad(), visadapt.using(model, "a"):
            torch.testing.assert_close(elsewhere(lambda replica=replica: replica(image)), answers[task])
            assert torch.equal(model(image), answers["a"])


def test_a_generator_may_be_run_by_one_thread_after_another(tiny, image, answers) -> None:
    """As a server does that sends what a generator yields."""
    a = stream(tiny, image, answers, "a")
    assert [elsewhere(lambda: next(a)) for _ in range(3)] == ["a", "a", "a"]
    with visadapt.using(tiny, None):
        assert next(a) == "a"
        assert meant(tiny, image, answers) is None
    assert elsewhere(lambda: next(a)) == "a"
    a.close()
    assert meant(tiny, image, answers) == "b"


def test_a_forward_is_for_what_was_chosen_where_it_began(tiny, image, answers) -> None:
    """Whatever is chosen meanwhile, here or in another thread."""
    for choose in (visadapt.activate, lambda *args: elsewhere(lambda: visadapt.activate(*args))):
        visadapt.activate(tiny, "a")
        handle = tiny.layer2.register_forward_hook(lambda *_, choose=choose: choose(tiny, "b") and None)
        with torch.no_grad():
            assert torch.equal(tiny(image), answers["a"])
        handle.remove()
        assert meant(tiny, image, answers) == "b"


def test_a_forward_inside_a_forward(tiny, image, answers) -> None:
    seen = []

    def look(*_):
        if not seen:
            seen.append(None)
            with visadapt.using(tiny, None):
                seen[0] = tiny(image)
            seen.append(visadapt.active(tiny))

    tiny.layer2.register_forward_hook(look)
    with torch.no_grad(), visadapt.using(tiny, "a"):
        assert torch.equal(tiny(image), answers["a"])
    assert torch.equal(seen[0], answers[None])
    assert seen[1] == "a"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_forward_that_was_interrupted_leaves_nothing_behind(tiny, image, answers, error) -> None:
    def interrupt(*_):
        raise error

    handle = tiny.layer2.register_forward_hook(interrupt)
    with visadapt.using(tiny, "a"), pytest.raises(error):
        tiny(image)
    assert visadapt.active(tiny) == "b"
    visadapt.activate(tiny, "a")
    with pytest.raises(error):
        tiny(image)
    handle.remove()
    visadapt.activate(tiny, "b")
    assert meant(tiny, image, answers) == "b"
    with visadapt.using(tiny, "a"):
        assert meant(tiny, image, answers) == "a"


def test_a_task_removed_while_it_is_in_use(tiny, image, answers) -> None:
    with visadapt.using(tiny, "a"):
        elsewhere(lambda: visadapt.remove(tiny, "a"))
        for use in (lambda: tiny(image), lambda: tiny.layer1(torch.randn(1, 64, 8, 8)), lambda: visadapt.active(tiny)):
            with pytest.raises(VisadaptError, match="'a' was removed while it was in use"):
                use()
        # another one of that name is another one
        visadapt.inject(tiny, m=2, task="a", norms="frozen", num_classes=3)
        with pytest.raises(VisadaptError, match="'a' was removed while it was in use"):
            tiny(image)
        with visadapt.using(tiny, "b"):
            assert meant(tiny, image, answers) == "b"
    with visadapt.using(tiny, ["a", "b"]):
        visadapt.remove(tiny, "b")
        with pytest.raises(VisadaptError, match="'b' was removed while it was in use"):
            tiny(image)
    assert visadapt.active(tiny) == "a"


@pytest.mark.parametrize("choose", [visadapt.using, lambda *args: contextlib.nullcontext(visadapt.activate(*args))])
@pytest.mark.parametrize("late", ["layer2", "fc"])
def test_a_task_removed_in_the_middle_of_a_forward(tiny, image, answers, choose, late) -> None:
    tiny.get_submodule(late).register_forward_hook(lambda *_: visadapt.remove(tiny, "a") and None)
    with choose(tiny, "a"), pytest.raises(VisadaptError, match="'a' was removed while it was in use"):
        tiny(image)


def test_copies_choose_for_themselves(tiny, image, answers) -> None:
    with visadapt.using(tiny, "a"):
        for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
            assert meant(twin, image, answers) == "b"
            with visadapt.using(twin, None):
                assert meant(twin, image, answers) is None
                assert meant(tiny, image, answers) == "a"


def ways(model, first, second):
    """Ways to run two forwards, each for its own task, and their backward."""

    def activated():
        visadapt.activate(model, "a")
        one = first()
        visadapt.activate(model, "b")
        two = second()
        (one + two).backward()

    def outside():
        with visadapt.using(model, "a"):
            one = first()
        with visadapt.using(model, "b"):
            two = second()
        one.backward()
        two.backward()

    def crossed():
        with visadapt.using(model, "a"):
            one = first()
        with visadapt.using(model, "b"):
            two = second()
            one.backward()
        with visadapt.using(model, None):
            two.backward()

    def elsewhere_backward():
        with visadapt.using(model, "a"):
            one = first()
        visadapt.activate(model, "b")
        two = second()
        with torch.no_grad():
            visadapt.activate(model, None)
            second()
        elsewhere(one.backward)
        elsewhere(two.backward)

    return [activated, outside, crossed, elsewhere_backward]


def build():
    model = ZOO["tiny/resnet"].make()
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        visadapt.inject(model, Bottleneck(m=2, init_std=0.1), task=task, norms="affine", num_classes=3)
    return model.train()


@pytest.mark.parametrize("way", range(4), ids=["activated", "outside", "crossed", "elsewhere"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["blocks", "layers", "root", "nested", "features"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_what_is_computed_again_is_for_the_task_of_its_forward(image, way, reentrant, where) -> None:
    x = image.clone().requires_grad_(True)

    def run(checkpointed):
        model = build()
        again = (lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)) if checkpointed else (lambda f, *a: f(*a))

        def wrap(*paths):
            for path in paths:
                module = model.get_submodule(path)
                forward = module.forward
                module.forward = lambda *a, f=forward: again(f, *a) if torch.is_grad_enabled() else f(*a)

        if where == "blocks":
            wrap("layer1.0", "layer2.1", "layer3.0", "layer4.1")
        elif where == "layers":
            wrap("layer1", "layer2", "layer3", "layer4", "global_pool")
        elif where == "nested":
            wrap("layer2.0", "layer2", "layer3.1", "layer3")

        def forward():
            if where == "root":
                out = again(model, x)
            elif where == "features":
                out = model.forward_head(again(model.forward_features, x))
            else:
                out = model(x)
            return out.square().sum()

        ways(model, forward, forward)[way]()
        return {f"{t}.{n}": p.grad for t in "ab" for n, p in visadapt.named_parameters(model, t)}

    expected, found = run(False), run(True)
    assert all(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_mixed_batch_is_computed_again_as_it_was(image, reentrant, monkeypatch) -> None:
    x = torch.cat([image, image + 1]).requires_grad_(True)
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)

    def run(checkpointed):
        model = build()
        model.set_grad_checkpointing(checkpointed)
        with visadapt.using(model, ["a", "b", "b", "a"]):
            loss = model(x).square().sum()
        with visadapt.using(model, ["b", "a", "b", "a"]):
            other = model(x).square().sum()
        (loss + 2 * other).backward()
        return [p.grad for t in "ab" for p in visadapt.parameters(model, t)]

    for one, other in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_task_removed_before_backward_is_not_computed_again(image, reentrant, monkeypatch) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model = build()
    model.set_grad_checkpointing()
    losses = []
    for tasks in ("a", "b", ["a", "b"], "a"):
        with visadapt.using(model, tasks):
            losses.append(model(image.requires_grad_()).square().sum())
    visadapt.remove(model, "a")
    visadapt.inject(model, Bottleneck(m=2, init_std=0.1), task="a", norms="affine", num_classes=3)
    losses[1].backward()
    for loss in (losses[0], losses[2], losses[3]):
        with pytest.raises(VisadaptError, match="'a' was removed while it was in use"):
            loss.backward()
    with visadapt.using(model, "a"):
        model(image).sum().backward()


def test_it_is_refused_where_it_cannot_be_known(image) -> None:
    """Threads number their nodes alike: two that train different tasks cannot be told apart in backward."""
    model = build()
    forward = model.layer2.forward
    model.layer2.forward = lambda x: checkpoint(forward, x, use_reentrant=False)

    def loss(task):
        with visadapt.using(model, task):
            return model(image).square().sum()

    first, second = (elsewhere(lambda task=task: loss(task)) for task in "ab")
    for each in (first, second):
        with pytest.raises(VisadaptError, match="cannot be known which task its forward was for"):
            each.backward()


@pytest.mark.parametrize("member", ["transformers/bert", "transformers/roberta"], indirect=True, scope="session")
def test_transformers_checkpointing(member, inputs) -> None:
    def run(checkpointed):
        model = member.make()
        for seed, task in enumerate("ab"):
            torch.manual_seed(seed)
            visadapt.inject(model, Bottleneck(m=4, init_std=0.1), task=task)
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        ways(model, *[lambda: output(model, inputs).square().sum()] * 2)[0]()
        return [p.grad for t in "ab" for p in visadapt.parameters(model, t)]

    for one, other in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(one, other)


def test_another_threads_compile_changes_nothing(image, monkeypatch) -> None:
    """``torch.compiler.is_compiling()`` is true everywhere while any thread compiles."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    model = build()
    forward = model.layer2.forward
    model.layer2.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    with visadapt.using(model, "a"):
        loss = model(image).square().sum()
    with visadapt.using(model, "b"):
        loss.backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "a"))
    assert all(p.grad is None for p in visadapt.parameters(model, "b"))


def test_the_log_of_a_long_run_is_short(image) -> None:
    model = build()
    registry = vars(model)["_visadapt"]
    for _ in range(50):
        with torch.no_grad():
            for task in "ab":
                with visadapt.using(model, task):
                    model(image[:, :, :8, :8])
                elsewhere(lambda task=task: visadapt.activate(model, task))
    assert sum(len(log.starts) for log in registry._logs.all) < 20
    assert not registry._open
    assert not registry._streams
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert visadapt.active(model) == "b"
