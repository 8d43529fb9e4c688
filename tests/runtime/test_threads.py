"""Promise 7: which task is meant is a thread's own affair."""

import threading

import pytest
import torch

import visadapt
from tests.models import answer, output, step, stir

ROUNDS = 40


def together(*functions):
    """Runs functions at once, each in its own thread; raises what one of them raises."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    barrier = threading.Barrier(len(functions))
    threads = [threading.Thread(target=guarded, args=(lambda f=f: f(barrier),)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def pair(model, inputs):
    """Two tasks and the answers of each, computed one after the other."""
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=4, task=task, norms="full", num_classes=3 + seed)
        stir(model, task, seed)
    return {task: answer(model, inputs, task) for task in (None, "a", "b")}


@pytest.mark.parametrize("member", ["tiny/resnet", "tiny/vgg_bn", "transformers/bert"], indirect=True, scope="session")
def test_threads_with_tasks_of_their_own_answer_as_if_alone(model, inputs, pair) -> None:
    def serve(task):
        def loop(barrier):
            for _ in range(ROUNDS):
                barrier.wait(timeout=60)
                with torch.no_grad(), visadapt.using(model, task):
                    assert visadapt.active(model) == task
                    assert torch.equal(output(model, inputs), pair[task])

        return loop

    together(serve("a"), serve("b"), serve(None), serve("a"))


@pytest.mark.parametrize("member", ["tiny/resnet", "transformers/distilbert"], indirect=True, scope="session")
def test_threads_can_train_two_tasks_at_once(model, inputs, pair) -> None:
    def gradients(task):
        return [p.grad for p in visadapt.parameters(model, task)]

    serial = {}
    for task in "ab":
        with visadapt.using(model, task):
            step(model, inputs)
        serial[task] = gradients(task)
        for p in visadapt.parameters(model, task):
            p.grad = None

    def learn(task):
        def loop(barrier):
            for _ in range(10):
                barrier.wait(timeout=60)
                for p in visadapt.parameters(model, task):
                    p.grad = None
                with visadapt.using(model, task):
                    step(model, inputs)
                for found, expected in zip(gradients(task), serial[task], strict=True):
                    assert found is expected is None or torch.equal(found, expected)

        return loop

    together(learn("a"), learn("b"))
    assert all(p.grad is None for name, p in model.named_parameters() if "visadapt" not in name.split("."))


@pytest.mark.parametrize("member", ["tiny/resnet"], indirect=True, scope="session")
def test_activate_reaches_the_threads_that_have_not_chosen(model, inputs, pair) -> None:
    visadapt.activate(model, "a")

    def chosen(barrier):
        with visadapt.using(model, "b"):
            barrier.wait(timeout=60)
            barrier.wait(timeout=60)
            assert visadapt.active(model) == "b"

    def idle(barrier):
        assert visadapt.active(model) == "a"
        barrier.wait(timeout=60)
        visadapt.activate(model, None)
        assert visadapt.active(model) is None
        barrier.wait(timeout=60)

    together(chosen, idle)
    assert visadapt.active(model) is None
