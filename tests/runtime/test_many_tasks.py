"""What a model costs does not depend on how many tasks it has, and torch's walks see the tasks in use."""

from __future__ import annotations

import copy
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import visadapt
from tests.models import ZOO, answer, stir
from tests.versions import ONE_GRAPH
from visadapt import LoRA, Norms, using
from visadapt.runtime.decider import Decider

FEW, MANY = 3, 60


def crowded(count: int) -> nn.Module:
    """A model with tasks of several kinds, the first one active."""
    model = ZOO["tiny/resnet"].make().eval()
    lora: dict[str, Any] = {"method": LoRA(r=1), "norms": "frozen"}
    kinds: tuple[dict[str, Any], ...] = ({"m": 2}, lora, {"method": Norms(), "norms": "full"})
    for number in range(count):
        visadapt.inject(model, task=f"t{number}", num_classes=3, **kinds[number % 3])
    return visadapt.activate(model, "t0")


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return crowded(FEW), crowded(MANY)


def calls(run: Callable[[], object]) -> int:
    """Count the calls of functions, C's included, in a second run."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    return pstats.Stats(profiler).total_calls  # type: ignore[attr-defined, no-any-return]


def in_block(model: nn.Module) -> None:
    with using(model, "t1"):
        pass


COSTS: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "zero_grad": lambda model: model.zero_grad(),
    "parameters": lambda model: list(model.parameters()),
    "named_parameters": lambda model: list(model.named_parameters()),
    "named_buffers": lambda model: list(model.named_buffers()),
    "modules": lambda model: list(model.modules()),
    "requires_grad": lambda model: model.requires_grad_(False),
    "apply": lambda model: model.apply(lambda module: None),
    "repr": repr,
    "forward": lambda model: model(torch.zeros(1, 3, 16, 16)),
    "activate": lambda model: visadapt.activate(model, "t0"),
    "using": in_block,
    "own parameters": lambda model: visadapt.parameters(model, "t0"),
    "trainable": lambda model: visadapt.trainable(model, "t0"),
    "inject and remove": lambda model: visadapt.remove(visadapt.inject(model, m=2, task="new", num_classes=3), "new"),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_call_costs_the_same_beside_many_tasks(pair, name) -> None:
    few, many = (calls(lambda model=model: COSTS[name](model)) for model in map(copy.deepcopy, pair))
    assert many <= 1.1 * few + 20


def test_load_and_save_cost_the_same_beside_many_tasks(pair, tmp_path) -> None:
    def again(model: nn.Module) -> None:
        visadapt.save(model, "t0", tmp_path / "t0.visadapt")
        visadapt.remove(model, visadapt.load(model, tmp_path / "t0.visadapt", task="new"))

    few, many = (calls(lambda model=model: again(model)) for model in map(copy.deepcopy, pair))
    assert many <= 1.1 * few + 20


def test_auto_costs_the_same_with_many_tasks(pair) -> None:
    x = torch.zeros(2, 3, 16, 16)

    @torch.no_grad()
    def auto(model: nn.Module) -> None:
        with using(model, "auto"):
            model(x)

    found = []
    for count, model in zip((FEW, MANY), map(copy.deepcopy, pair), strict=True):
        names = tuple(f"t{number}" for number in range(count))
        visadapt.tasks(model)
        model._visadapt.decider = Decider(names, torch.zeros(32), torch.ones(32)).eval()  # type: ignore[union-attr]
        found.append(calls(lambda model=model: auto(model)))
    assert found[1] <= 1.1 * found[0] + 20


def test_all_tensors_of_all_tasks_are_copied_moved_and_saved(image) -> None:
    model = crowded(FEW)
    for number in range(FEW):
        stir(model, f"t{number}", number)
    visadapt.activate(model, None)
    assert not any("visadapt.t" in name for name, _ in model.named_parameters())
    keys = [key for key in model.state_dict() if ".visadapt." in key]
    assert {key.split(".visadapt.")[1].split(".")[0] for key in keys} == {"t0", "t1", "t2"}
    twin = copy.deepcopy(model)
    fresh = crowded(FEW)
    fresh.load_state_dict(model.state_dict())
    for task in (None, "t0", "t1", "t2"):
        expected = answer(model, {"x": image}, task)
        assert torch.equal(answer(twin, {"x": image}, task), expected)
        assert torch.equal(answer(fresh, {"x": image}, task), expected)
    assert {t.dtype for t in twin.double().state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert twin.state_dict().keys() == model.state_dict().keys()
    moved = {p.data_ptr() for p in visadapt.parameters(model, "t1")}
    assert moved == {p.data_ptr() for p in visadapt.parameters(model.to("cpu"), "t1")}


def test_a_state_dict_is_what_torch_writes(pair) -> None:
    """The quick walk against torch's own, metadata included."""
    model = pair[0]
    found = model.state_dict()
    for path, module in model.named_modules():
        if path.endswith("visadapt"):
            for task in module:
                torchs = module[task].state_dict(prefix=f"{path}.{task}.")
                part = {key: value for key, value in found.items() if key.startswith(f"{path}.{task}.")}
                assert list(part) == list(torchs)
                assert all(part[key].data_ptr() == torchs[key].data_ptr() for key in part)
                assert all(found._metadata[key] == value for key, value in torchs._metadata.items())


def test_a_state_dict_hook_of_a_part_is_called() -> None:
    model = crowded(FEW)
    part = model.get_submodule("layer1.0.bn2.visadapt.t0.bottleneck")
    part.register_state_dict_post_hook(lambda _, state, prefix, meta: state.update({f"{prefix}seen": torch.ones(1)}))
    assert any(key.endswith("bottleneck.seen") for key in model.state_dict())


def test_a_checkpoint_with_an_unknown_task_is_refused_and_one_without_a_task_leaves_it() -> None:
    model = crowded(FEW)
    stir(model, "t1")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    part = {key: value + 1 if value.is_floating_point() else value for key, value in state.items() if ".t1." not in key}
    model.load_state_dict(part)
    after = model.state_dict()
    for key, value in state.items():
        assert torch.equal(after[key], value if ".t1." in key else part[key])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*visadapt\.t9"):
        model.load_state_dict({**state, "layer1.0.bn2.visadapt.t9.bottleneck.up.weight": torch.ones(1)})
    missing = {key: value for key, value in state.items() if not key.endswith("visadapt.t1.lora.b")}
    assert len(missing) < len(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*visadapt\.t1\.lora\.b"):
        model.load_state_dict(missing)


def modes(model: nn.Module, task: str) -> set[bool]:
    return {module.training for own in model._visadapt.parts(task).values() for module in own.modules()}  # type: ignore[union-attr, operator]


def test_modes_follow_when_a_task_is_next_used(image) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make().eval(), visadapt.Bottleneck(m=8, dropout=0.9), task="a")
    visadapt.inject(model, m=2, task="b")
    stir(model, "a")
    model.train()
    with using(model, "a"):
        drawn = [model(image) for _ in range(2)]
    assert not torch.equal(*drawn)
    model.eval()
    assert modes(model, "a") == {False}
    with using(model, "a"):
        assert torch.equal(model(image), model(image))
        model.train()
        assert not torch.equal(model(image), model(image))


def test_what_is_set_for_one_part_alone_stays(image) -> None:
    model = crowded(FEW)
    part = model.get_submodule("layer1.0.bn2.visadapt.t0.bottleneck")
    model.train()
    part.eval()
    list(model.modules())
    model(image)
    assert not part.training
    visadapt.trainable(model, "t0")
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    model.eval()
    model(image)
    assert not any(p.requires_grad for p in part.parameters())


def test_zero_grad_reaches_every_task_that_has_a_gradient(image) -> None:
    """Whatever is chosen between a forward and its backward, or between that and zero_grad."""
    model = crowded(FEW)
    own = {task: visadapt.parameters(model, task) for task in ("t0", "t1", "t2")}
    losses = []
    for task in ("t0", "t1"):
        visadapt.activate(model, task)
        losses.append(model(image).sum())
    with using(model, "t2"):
        losses.append(model(image).sum())
    visadapt.inject(model, m=2, task="late")
    torch.stack(losses).sum().backward()
    visadapt.activate(model, None)
    assert all(any(p.grad is not None for p in parameters) for parameters in own.values())
    listed = {id(p) for p in model.parameters()}
    assert all(id(p) in listed for parameters in own.values() for p in parameters)
    model.zero_grad()
    assert all(p.grad is None for parameters in own.values() for p in parameters)
    visadapt.trainable(model, "t0")
    names = [name for name, _ in model.named_parameters() if "visadapt" in name.split(".")]
    assert names
    assert all(".visadapt.t0." in name for name in names)


def test_parameters_that_were_asked_for_are_listed_until_another_task_comes() -> None:
    model = crowded(FEW)
    own = {id(p) for p in visadapt.parameters(model, "t1")}
    assert own <= {id(p) for p in model.parameters()}
    visadapt.activate(model, "t2")
    assert not own & {id(p) for p in model.parameters()}


def test_trainable_reaches_tasks_that_are_not_in_use() -> None:
    model = crowded(FEW)
    visadapt.trainable(model, "t1")
    assert {p.requires_grad for p in visadapt.parameters(model, "t2")} == {False}
    visadapt.inject(model, m=2, task="late")
    assert {p.requires_grad for p in visadapt.parameters(model, "late")} == {True}
    visadapt.trainable(model, ["t2", "late"])
    for task, flows in (("t0", False), ("t1", False), ("t2", True), ("late", True)):
        assert {p.requires_grad for p in visadapt.parameters(model, task)} == {flows}


def test_several_processes_see_all_tasks(tmp_path) -> None:
    model = crowded(FEW)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        names = [name for name, _ in model.named_parameters()]
    finally:
        torch.distributed.destroy_process_group()
    assert all(any(f".visadapt.t{number}." in name for name in names) for number in range(FEW))


@ONE_GRAPH
def test_a_task_that_comes_compiles_nothing_anew(image) -> None:
    torch.compiler.reset()
    model = crowded(FEW)
    counted = CompileCounter()
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    with torch.no_grad():
        compiled(image)
        frames = counted.frame_count
        model.train()
        model.eval()
        visadapt.inject(model, m=2, task="late")
        visadapt.activate(model, "t0")
        out: Tensor = compiled(image)
    assert counted.frame_count == frames
    assert torch.equal(out, model(image))
