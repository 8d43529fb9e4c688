"""Tasks in use: which one answers, when, and what is said of each."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import visadapt
from tests.models import ZOO, anatomy, answer, same, snapshot, stir
from visadapt import VisadaptError


@pytest.fixture
def three(tiny, image):
    """A model with tasks a, b, c and the answers of each, the bare backbone's under None."""
    for seed, task in enumerate("abc"):
        visadapt.inject(tiny, m=2, task=task, norms="full")
        stir(tiny, task, seed)
    answers = {task: answer(tiny, {"x": image}, task) for task in (None, *"abc")}
    assert not any(torch.equal(answers[s], answers[t]) for s in answers for t in answers if s != t)
    return answers


def test_the_last_injected_task_is_active(tiny, three, image) -> None:
    assert visadapt.active(tiny) == "c"
    assert list(visadapt.tasks(tiny)) == ["a", "b", "c"]
    assert torch.equal(tiny(image), three["c"])


def test_activate_stays_until_the_next(tiny, three, image) -> None:
    for task in ("a", None, "b", "a", "a", None):
        assert visadapt.activate(tiny, task) is tiny
        assert visadapt.active(tiny) == task
        assert torch.equal(tiny(image), three[task])


def test_using_ends_with_its_block_and_nests(tiny, three, image) -> None:
    visadapt.activate(tiny, "a")
    with visadapt.using(tiny, "b") as model:
        assert model is tiny
        assert torch.equal(tiny(image), three["b"])
        with visadapt.using(tiny, None):
            assert torch.equal(tiny(image), three[None])
            with visadapt.using(tiny, "c"):
                assert torch.equal(tiny(image), three["c"])
            assert visadapt.active(tiny) is None
        assert visadapt.active(tiny) == "b"
        # activate is for whoever has not chosen here: the block's own choice wins until it ends
        visadapt.activate(tiny, "c")
        assert torch.equal(tiny(image), three["b"])
    assert torch.equal(tiny(image), three["c"])


def test_using_ends_with_an_error_too(tiny, three) -> None:
    visadapt.activate(tiny, "a")
    with pytest.raises(RuntimeError, match="inside"), visadapt.using(tiny, "b"):
        raise RuntimeError("inside")
    assert visadapt.active(tiny) == "a"


def test_using_one_model_says_nothing_of_another(tiny, three, image) -> None:
    other = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="a")
    with visadapt.using(tiny, "b"), visadapt.using(other, None):
        assert visadapt.active(tiny) == "b"
        assert visadapt.active(other) is None
        with visadapt.using(tiny, None):
            assert visadapt.active(tiny) is None
        assert torch.equal(tiny(image), three["b"])
    assert visadapt.active(other) == "a"


@given(moves=st.lists(st.sampled_from([None, "a", "b", "c", "<", ">"]), max_size=20))
def test_any_sequence_of_choices_is_a_stack(moves) -> None:
    """A choice in a block wins over activate, and blocks unwind in order: the model of it is a plain stack."""
    blocks, active = [], "c"
    for move in moves:
        if move == ">":
            blocks.append(visadapt.using(STACK, "b" if len(blocks) % 2 else None))
            blocks[-1].__enter__()
        elif move == "<":
            if blocks:
                blocks.pop().__exit__(None, None, None)
        else:
            visadapt.activate(STACK, move)
            active = move
        expected = active if not blocks else (None, "b")[(len(blocks) - 1) % 2]
        assert visadapt.active(STACK) == expected
    while blocks:
        blocks.pop().__exit__(None, None, None)
    visadapt.activate(STACK, "c")


STACK = ZOO["tiny/resnet"].make()
for name in "abc":
    visadapt.inject(STACK, m=1, task=name, norms="frozen")


def test_coroutines_choose_each_for_themselves(tiny, three, image) -> None:
    async def serve(task):
        with visadapt.using(tiny, task):
            for _ in range(5):
                await asyncio.sleep(0)
                assert visadapt.active(tiny) == task
                # no await within: gradient mode is a thread's and not a coroutine's
                with torch.no_grad():
                    assert torch.equal(tiny(image), three[task])

    async def main():
        with visadapt.using(tiny, "a"):
            await asyncio.gather(*(serve(task) for task in ("a", "b", None, "c", "b")))
            assert visadapt.active(tiny) == "a"

    asyncio.run(main())


def test_a_task_may_have_several_methods(tiny, image) -> None:
    expected = answer(tiny, {"x": image})
    visadapt.inject(tiny, m=2, task="a", where="layer1", num_classes=3)
    head = answer(tiny, {"x": image}, "a")
    stir(tiny, "a")
    trained = answer(tiny, {"x": image}, "a")
    visadapt.inject(tiny, m=4, task="a", where="layer2")
    assert torch.equal(answer(tiny, {"x": image}, "a"), trained)
    assert head.shape == (2, 3)
    assert [p.method.m for p in visadapt.tasks(tiny)["a"].placements] == [2, 4]
    assert visadapt.summary(tiny)["a"].sites == 4
    assert visadapt.summary(tiny)["a"].methods == "Bottleneck(m=2) + Bottleneck(m=4)"
    assert torch.equal(answer(tiny, {"x": image}, None), expected)


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_remove_takes_one_task_and_leaves_the_others(tiny, three, image, gone) -> None:
    visadapt.activate(tiny, "b")
    assert visadapt.remove(tiny, gone) is tiny
    assert visadapt.active(tiny) == (None if gone == "b" else "b")
    assert list(visadapt.tasks(tiny)) == [task for task in "abc" if task != gone]
    assert not any(f"visadapt.{gone}." in key for key in tiny.state_dict())
    for task in (None, *visadapt.tasks(tiny)):
        assert torch.equal(answer(tiny, {"x": image}, task), three[task])
    with pytest.raises(VisadaptError, match=f"no task '{gone}'"):
        visadapt.activate(tiny, gone)


def test_removing_all_leaves_a_frozen_backbone_that_can_be_injected_again(tiny, three, image) -> None:
    for task in "abc":
        visadapt.remove(tiny, task)
    assert visadapt.tasks(tiny) == {}
    assert not any("visadapt" in key for key in tiny.state_dict())
    before = snapshot(tiny)
    tiny.train()
    tiny(image)
    assert same(snapshot(tiny), before)
    assert not any(p.requires_grad for p in tiny.parameters())
    visadapt.inject(tiny, m=2, task="a")
    assert torch.equal(answer(tiny, {"x": image}, "a"), three[None])


@given(order=st.permutations(["a", "b", "c"]), kept=st.integers(0, 3))
def test_tasks_come_and_go_in_any_order(order, kept) -> None:
    model = ZOO["tiny/resnet"].make()
    before, state = anatomy(model), snapshot(model)
    for task in "abc":
        visadapt.inject(model, m=1, task=task, norms="frozen" if task == "a" else "full", head="frozen")
    for task in order[kept:]:
        visadapt.remove(model, task)
    assert set(visadapt.tasks(model)) == set(order[:kept])
    visadapt.eject(model)
    assert anatomy(model) == before
    assert same(model.state_dict(), state)


def test_parameters_are_the_active_tasks_by_default(tiny, three) -> None:
    visadapt.activate(tiny, "b")
    assert [id(p) for p in visadapt.parameters(tiny)] == [id(p) for p in visadapt.parameters(tiny, "b")]
    with visadapt.using(tiny, "a"):
        assert [id(p) for p in visadapt.parameters(tiny)] == [id(p) for p in visadapt.parameters(tiny, "a")]


def test_summary_counts_what_the_state_dict_holds(model, member) -> None:
    whole = sum(p.numel() for p in model.parameters())
    visadapt.inject(model, m=4, task="full", norms="full", num_classes=7)
    visadapt.inject(model, m=4, task="bare", norms="frozen", head="frozen")
    summary = visadapt.summary(model)
    assert list(summary) == ["full", "bare"]
    for task, row in summary.items():
        assert row.trained == sum(p.numel() for p in visadapt.parameters(model, task))
        own = [t for key, t in model.state_dict().items() if f".visadapt.{task}." in key]
        assert row.bytes == sum(t.numel() * t.element_size() for t in own)
        assert row.fraction == (row.adapters + row.norms) / summary.backbone
    assert (summary["bare"].norms, summary["bare"].head, summary["bare"].num_classes) == (0, 0, None)
    assert (summary["full"].num_classes, summary["full"].norm_policy) == (7, "full")
    assert summary["full"].adapters == summary["bare"].adapters
    assert bool(summary["full"].norms) == bool(member.norm)
    assert 0 < summary.backbone < whole
