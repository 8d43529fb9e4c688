"""The core on a device: ``VISADAPT_TEST_DEVICE=cuda pytest tests/test_device.py``; by default on the CPU."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.methods.cases import CASES
from tests.models import ZOO, answer, output, stir
from visadapt.training import Recipe, evaluate, fit, predict

NAMES = ("tiny/resnet", "tiny/vgg_bn", "torchvision/resnet18", "transformers/bert")


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone and its inputs on the device."""
    member = ZOO[request.param]
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in member.inputs().items()}
    return member.make().to(device), inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**inputs)
    out = getattr(out, "logits", out)
    return out if isinstance(out, Tensor) else out[0]


def close(found: Tensor, expected: Tensor, device: torch.device) -> None:
    # convolutions of an accelerator may sum in another order, in tf32
    tolerance = 1e-4 if device.type == "cpu" else 2e-2
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def moved(model: nn.Module, task: str) -> nn.Module:
    """Change everything that a task trains a little."""
    with torch.no_grad():
        for parameter in visadapt.parameters(model, task):
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def test_inject_is_the_identity_and_its_parts_are_on_the_device(place: Any, device: torch.device) -> None:
    model, inputs = place
    before = logits(model, inputs)
    visadapt.inject(model, m=4, task="a")
    close(logits(model, inputs), before, device)
    assert {p.device.type for p in visadapt.parameters(model, "a")} == {device.type}
    model.train()
    out = model(**inputs)
    out = getattr(out, "logits", out)
    out.float().square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in visadapt.parameters(model, "a"))


def test_a_mixed_batch_equals_one_task_at_a_time(place: Any, device: torch.device) -> None:
    model, inputs = place
    for task, classes in (("a", 3), ("b", 3)):
        moved(visadapt.inject(model, m=4, task=task, num_classes=classes), task)
    rows = len(next(iter(inputs.values())))
    names = (["a", "b"] * rows)[:rows]
    alone = {}
    for task in ("a", "b"):
        with visadapt.using(model, task):
            alone[task] = logits(model, inputs)
    with visadapt.using(model, names):
        mixed = logits(model, inputs)
    close(mixed, torch.stack([alone[task][i] for i, task in enumerate(names)]), device)


def test_lean_training_gives_the_same_gradients(place: Any, device: torch.device) -> None:
    model, inputs = place
    moved(visadapt.inject(model, m=4, task="a", num_classes=3), "a")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model.eval()(**inputs)
        getattr(out, "logits", out).float().square().sum().backward()
        return [p.grad.clone() for p in visadapt.parameters(model, "a") if p.grad is not None]

    expected = gradients()
    visadapt.lean(model)
    for found, other in zip(gradients(), expected, strict=True):
        close(found, other, device)


def test_merging_gives_the_same_outputs(place: Any, device: torch.device) -> None:
    model, inputs = place
    moved(visadapt.inject(model, visadapt.LoRA(r=2), task="a", num_classes=3), "a")
    expected = logits(model, inputs)
    plain = visadapt.merge(model, "a")
    assert {p.device.type for p in plain.parameters()} == {device.type}
    close(logits(plain, inputs), expected, device)


def test_save_and_load_give_the_same_outputs(place: Any, device: torch.device, tmp_path: Path) -> None:
    model, inputs = place
    moved(visadapt.inject(model, m=4, task="a", num_classes=3), "a")
    expected = logits(model, inputs)
    visadapt.save(model, "a", tmp_path / "a.visadapt")
    visadapt.remove(model, "a")
    visadapt.load(model, tmp_path / "a.visadapt")
    assert {p.device.type for p in visadapt.parameters(model, "a")} == {device.type}
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("options", [{}, {"fast": True}], ids=["fp32", "fast"])
def test_fit_learns_resumes_and_scores(device: torch.device, tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    recipe = Recipe(epochs=8, lr=3e-2, batch_size=16, **options)

    def run(file: Path | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="a", num_classes=2)
        return model, fit(model, "a", (x, y), (x, y), recipe, device=device, checkpoint=file)

    model, result = run(tmp_path / "a.checkpoint")
    assert result.head_first.startswith("linear probe")
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert result.score is not None
    assert result.start is not None
    assert result.score >= result.start > 0.6
    assert run(tmp_path / "a.checkpoint")[1] == result
    precision = "bf16" if options else None
    assert evaluate(model, "a", (x, y), ("accuracy",), precision=precision)["accuracy"] == pytest.approx(
        result.score, abs=0 if device.type == "cpu" else 0.05
    )
    assert predict(model, "a", x).device.type == "cpu"


SUITED = [
    pytest.param(case, name, id=f"{method}-{name}")
    for method, case in CASES.items()
    for name in ("tiny/resnet", "transformers/bert", "timm/resnet26t")
    if case.suits(ZOO[name]) and (name != "timm/resnet26t" or method == "colora")
]


def on(device: torch.device, name: str, n: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    inputs = ZOO[name].inputs(n=n)
    return ZOO[name].make().to(device), {key: value.to(device) for key, value in inputs.items()}


def with_tasks(name: str, device: torch.device, n: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone with three bottlenecks, and inputs for it."""
    model, inputs = on(device, name, n)
    for number, task in enumerate("abc"):
        visadapt.inject(model, m=4, task=task, num_classes=3)
        stir(model, task, number)
    return model.eval(), inputs


@pytest.mark.parametrize(("case", "name"), SUITED)
def test_every_method_trains_mixes_and_travels(case: Any, name: str, device: torch.device, tmp_path: Path) -> None:
    model, inputs = on(device, name, n=5)
    for number, task in enumerate("abc"):
        case.put(model, task)
        stir(model, task, number)
    alone = {task: answer(model.eval(), inputs, task) for task in "abc"}
    tasks = list("cabba")
    with torch.no_grad(), visadapt.using(model, tasks):
        mixed = output(model, inputs)
    close(mixed, torch.stack([alone[task][i] for i, task in enumerate(tasks)]), device)

    visadapt.activate(model, "b")
    output(model.train(), inputs).square().mean().backward()
    gradients = [p.grad for p in visadapt.parameters(model, "b") if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert {gradient.device.type for gradient in gradients} == {device.type}

    visadapt.save(model, "b", tmp_path / "b.visadapt")
    other, elsewhere = on(torch.device("cpu"), name, n=5)
    visadapt.load(other, tmp_path / "b.visadapt")
    close(answer(other.eval(), elsewhere, "b"), answer(model.eval(), inputs, "b").cpu(), device)
    close(answer(other.to(device), inputs, "b"), answer(model, inputs, "b"), device)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
def test_a_compiled_model_answers_for_every_composition(name: str, device: torch.device) -> None:
    model, inputs = with_tasks(name, device, n=6)
    torch._dynamo.reset()
    # kernels are compiled for an accelerator only: for a CPU it takes minutes
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
    for tasks in ("abcaab", "bbccba", "cabcab"):
        with torch.no_grad(), visadapt.using(model, list(tasks)):
            expected = output(model, inputs)
            close(output(compiled, inputs), expected, device)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
@pytest.mark.parametrize("options", [{"compute": torch.bfloat16}, {"weights": "int8"}], ids=["bf16", "int8"])
def test_compact_frozen_layers_answer_nearly_the_same(name: str, options: Any, device: torch.device) -> None:
    model, inputs = with_tasks(name, device)
    expected = answer(model, inputs, "a")
    visadapt.lean(model, **options)
    found = answer(model, inputs, "a")
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    visadapt.activate(model, "a")
    output(model.train(), inputs).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in visadapt.parameters(model, "a"))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_cached_prefix_gives_the_same_outputs(where: str, device: torch.device, tmp_path: Path) -> None:
    model, inputs = on(device, "tiny/resnet", n=6)
    visadapt.inject(model, m=2, task="a", num_classes=3, where="layer4")
    stir(model, "a")
    expected = answer(model, inputs, "a")
    file = {"file": tmp_path / "prefix.cache"} if where == "file" else {}
    cached = visadapt.cache_prefix(model, "a", inputs["x"].cpu(), prepare=lambda x: x.to(device), **file)
    with visadapt.using(model, "a"), torch.no_grad():
        close(cached(torch.arange(6)).resume(), expected, device)
    cached.prefix.close()


def test_tasks_of_threads_do_not_mix(device: torch.device) -> None:
    model, inputs = with_tasks("tiny/resnet", device)
    alone = {task: answer(model, inputs, task) for task in "abc"}
    wrong: list[str] = []

    def work(task: str) -> None:
        found = [answer(model, inputs, task) for _ in range(10)]
        wrong.extend(task for out in found if (out - alone[task]).abs().max() > 1e-3)

    threads = [threading.Thread(target=work, args=(task,)) for task in "abcabc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_step_does_not_wait_for_the_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA reports what waits for it")
    x = torch.randn(256, 3, 16, 16)
    y = (x.mean((1, 2, 3)) > 0).long()

    def waits(epochs: int) -> int:
        model = visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="a", num_classes=2)
        recipe = Recipe(epochs=epochs, lr=1e-2, batch_size=16, head_first=False)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(model, "a", (x, y), None, recipe, device=device, progress=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)

    # 16 steps per epoch: an epoch may read its losses and its random state, but no step of it may wait
    assert waits(3) - waits(2) <= 8


@pytest.mark.parametrize("method", ["bottleneck", "lora", "full"])
@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
def test_steps_as_graphs_train_as_others_do(name: str, method: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA has such graphs")
    if name == "tiny/resnet":
        data: Any = torch.randn(200, 3, 16, 16)
        labels = (data.mean((1, 2, 3)) > 0).long()
        prepare = None
    else:
        tokens = torch.randint(5, 60, (200, 12))
        labels = (tokens[:, 1] > 30).long()
        data, prepare = tokens, lambda tokens: {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def run(compile: str | None) -> tuple[list[Tensor], Any, nn.Module]:
        torch.manual_seed(0)
        model = CASES[method].put(ZOO[name].make(), "a", 2)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        recipe = Recipe(epochs=2, lr=1e-3, batch_size=32, head_first=False, compile=compile)
        result = fit(model, "a", (data, labels), (data, labels), recipe, prepare=prepare, device=device, progress=False)
        return [p.detach() for p in visadapt.parameters(model, "a")], result, model

    expected, first, _ = run(None)
    found, second, model = run("graphs")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)
    assert second.score == pytest.approx(first.score, abs=0.03)
    assert all(parameter.grad is None for parameter in visadapt.parameters(model, "a"))
