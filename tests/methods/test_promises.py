"""What every method promises, over architectures."""

import copy

import pytest
import torch

import visadapt
from tests.methods.cases import CASES, MEMBERS
from tests.models import ZOO, answer, bare_part, output, same, short, snapshot, step, stir, train
from tests.versions import compiled_whole
from visadapt.methods import METHODS

# a dense adapter at a grouped convolution says that it is the larger of the two
pytestmark = pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")


QUICK = ("parallel", "series", "dan-6-bits", "residual-parallel", "adaptformer")
"""One of each role, to compile wherever the tests are run."""


@pytest.fixture
def case(request, member):
    found = CASES[request.param]
    if not found.suits(member):
        pytest.fail(f"{request.param} does not stand in {member.name}")
    return found


def marked(member, case, quick):
    return pytest.param(member, case, marks=() if quick else pytest.mark.slow)


def over(*members):
    """Every case that suits a member, in every one of them."""
    pairs = [marked(m, c, m in MEMBERS[:2]) for m in members for c, case in CASES.items() if case.suits(ZOO[m])]
    return pytest.mark.parametrize(("member", "case"), pairs, indirect=True, scope="session")


def test_every_method_is_a_case() -> None:
    assert {type(case.method) for case in CASES.values()} == set(METHODS.values())


@over(*MEMBERS)
def test_starts_as_it_was(model, inputs, case) -> None:
    before = answer(model, inputs)
    head = "frozen" if not isinstance(case.method, visadapt.Linear) else "copy"
    case.put(model, num_classes=None, head=head)
    after = answer(model, inputs, "task")
    if case.near:
        torch.testing.assert_close(after, before, rtol=case.near, atol=case.near)
    else:
        assert torch.equal(after, before)
    assert torch.equal(answer(model, inputs, None), before)


@over(*MEMBERS)
def test_learns_and_nothing_else_does(model, inputs, lent, case) -> None:
    """After three steps every tensor of the task is another, and the backbone is what it was, bit for bit."""
    bare = answer(model, inputs)
    case.put(model)
    named = dict(visadapt.named_parameters(model, "task"))
    start = {name: p.detach().clone() for name, p in named.items()}
    model.train()
    step(model, inputs)
    methods = [name for name in named if f".{case.method.part}." in f".{name}"]
    assert not methods or any(named[name].grad is not None and named[name].grad.any() for name in methods)
    train(model, "task", inputs, steps=3)
    still = [name for name, p in named.items() if torch.equal(p, start[name])]
    assert not still, still
    assert all(p.grad is None for name, p in model.named_parameters() if "visadapt" not in name.split("."))
    assert same(bare_part(snapshot(model)), lent["state"])
    assert torch.equal(answer(model, inputs, None), bare)


@over(*MEMBERS)
def test_saves_loads_copies_and_leaves(model, inputs, lent, case, tmp_path) -> None:
    case.put(model)
    stir(model, "task")
    expected = answer(model, inputs, "task")
    copied = copy.deepcopy(model)
    file = visadapt.save(model, "task", tmp_path / "task.visadapt")
    summary = visadapt.summary(model)["task"]
    numbers = sum(p.numel() for p in visadapt.parameters(model, "task"))
    assert summary.trained == numbers
    assert str(case.method) in str(visadapt.summary(model))
    visadapt.remove(model, "task")
    assert not visadapt.tasks(model)
    visadapt.load(model, file)
    assert torch.equal(answer(model, inputs, "task"), expected)
    assert visadapt.summary(model)["task"] == summary
    # what is loaded is the same task again: it can be saved and trained
    assert visadapt.save(model, "task", tmp_path / "again.visadapt").read_bytes() == file.read_bytes()
    stir(model, "task")
    assert torch.equal(answer(copied, inputs, "task"), expected)
    visadapt.eject(copied)
    assert same(copied.state_dict(), lent["state"])


@over("tiny/resnet", "transformers/bert", "timm/resnext50_32x4d")
def test_two_tasks_do_not_meet(model, inputs, case) -> None:
    case.put(model, task="one")
    stir(model, "one")
    one = answer(model, inputs, "one")
    case.put(model, task="two", num_classes=3)
    train(model, "two", inputs, steps=1)
    assert torch.equal(answer(model, inputs, "one"), one)
    visadapt.remove(model, "one")
    assert answer(model, inputs, "two").shape[1] == 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(marked(False, c, c in QUICK) for c, case in CASES.items() if case.images),
        *(marked(True, c, c in QUICK) for c in ("adaptformer", "full", "ssf")),
    ],
)
# of dynamo itself, where a graph begins behind a module that runs uncompiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiles_whole(text, name) -> None:
    model, inputs = short(text), ZOO["transformers/bert" if text else "tiny/resnet"].inputs()
    CASES[name].put(model, num_classes=None, head="copy")
    stir(model, "task")
    expected, bare = answer(model, inputs, "task"), answer(model, inputs, None)
    torch._dynamo.reset()
    compiled = compiled_whole(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, inputs), expected)
        with visadapt.using(model, None):
            torch.testing.assert_close(output(compiled, inputs), bare)
    step(compiled, inputs)
    assert all(p.grad is not None for p in visadapt.parameters(model, "task"))


TRIOS = {
    "tiny/resnet": [
        ("parallel", "parallel", "series"),
        ("dan-6-bits", "full", "lora"),
        ("residual-parallel", "residual-parallel", "ssf"),
        ("ssf", "ssf", "tsa"),
        ("residual-parallel", "top-layers", "conv-sequential"),
        ("parallel-low-rank", "parallel-low-rank", "norms"),
    ],
    "transformers/bert": [
        ("lora", "adaptformer", "full"),
        ("adaptformer", "adaptformer", "ssf"),
        ("biases", "top-layers", "dan-of-linears"),
    ],
    "timm/resnext50_32x4d": [("conv-parallel", "dan-diagonal", "lora")],
}


@pytest.mark.parametrize(
    ("member", "trio"),
    [(m, trio) for m, trios in TRIOS.items() for trio in trios],
    indirect=["member"],
    scope="session",
)
def test_three_methods_in_one_batch(model, member, trio) -> None:
    inputs = member.inputs(n=7)
    for i, name in enumerate(trio):
        CASES[name].put(model, task=f"t{i}", num_classes=4 + i)
        stir(model, f"t{i}", seed=i)
    tasks = ["t0", "t2", None, "t1", "t1", "t0", "t2"]
    mixed = answer(model, inputs, tasks)
    for task in set(tasks):
        rows = [i for i, name in enumerate(tasks) if name == task]
        alone = answer(model, inputs, task)
        torch.testing.assert_close(mixed[rows, : alone.shape[1]], alone[rows], rtol=1e-5, atol=1e-5)
        assert (mixed[rows, alone.shape[1] :] == float("-inf")).all()
