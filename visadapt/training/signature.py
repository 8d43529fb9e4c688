"""Identify a training run, so that a checkpoint resumes only the run that wrote it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from typing import Any

from torch import Tensor, nn

from visadapt.backbone.fingerprint import differences, fingerprint
from visadapt.backbone.modules import unwrapped
from visadapt.runtime.registry import find_registry
from visadapt.tensor_file import raw
from visadapt.training.batches import Batches
from visadapt.typed import fits


def identity(
    model: nn.Module, task: str | None, train: Batches, validation: Batches | None, **settings: Any
) -> dict[str, Any]:
    """Describe backbone, task, data and settings as JSON values.

    Tensors are described by digests; a ``DataLoader`` only by its number of batches.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        train: the training data.
        validation: the validation data, if any.
        settings: JSON values or dataclasses.
    """
    description = {
        "task": _task(model, task),
        "backbone": _backbone(model, task),
        "training data": _data(train),
        "validation data": None if validation is None else _data(validation),
        **{k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in settings.items()},  # type: ignore[arg-type]
    }
    return json.loads(json.dumps(description))  # type: ignore[no-any-return]


def described(value: Any) -> Any:
    """Describe a loss or a metric as JSON values, so that runs with different ones differ.

    A name describes itself. A module or another object is described by its class, its plain attributes and its tensors;
    a function by its name, its bytecode and what it closes over; a ``functools.partial`` by its function and arguments.
    Global variables that a function reads are not covered.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Tensor):
        return _digest(raw(value.detach()))
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if isinstance(value, dict):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, functools.partial):
        return {"function": described(value.func), "arguments": described([*value.args, value.keywords])}
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": described(value.__self__)}
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, types.FunctionType):
        cells = [described(cell.cell_contents) for cell in value.__closure__ or ()]
        defaults = described([value.__defaults__, value.__kwdefaults__])
        return {"function": name, "code": _code(value.__code__), "closure": cells, "defaults": defaults}
    if isinstance(value, type | types.BuiltinFunctionType):
        return {"function": name}
    return {"class": name, **_attributes(value)}


def _attributes(value: Any) -> dict[str, Any]:
    plain = {
        key: each
        for key, each in getattr(value, "__dict__", {}).items()
        if not key.startswith("_")
        and key != "training"
        and (each is None or isinstance(each, str | int | float | tuple | list))
    }
    tensors = value.state_dict() if isinstance(value, nn.Module) else {}
    return {"settings": json.loads(json.dumps(plain, default=str)), "tensors": described(tensors)}


def _code(code: types.CodeType) -> str:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return _digest(code.co_code + repr((constants, code.co_names)).encode())


def unlike(saved: dict[str, Any], expected: dict[str, Any]) -> str:
    """Describe the differences between two identities in words; empty if there are none."""
    words = []
    for name in expected:
        theirs, ours = saved.get(name), expected[name]
        if theirs == ours:
            continue
        if name == "backbone":
            known: dict[str, list[str]] = {}
            if isinstance(theirs, dict) and fits(theirs, dict[str, list[str]]):
                known = {group: pair for group, pair in theirs.items() if len(pair) == 2}
            words.append(f"another backbone: {differences(known, ours, values=True)}")
        elif isinstance(theirs, dict) and isinstance(ours, dict):
            pairs = [(k, theirs.get(k), ours.get(k)) for k in {**theirs, **ours}]
            words += [f"{name}: {k} was {then}, is {now}" for k, then, now in pairs if then != now]
        else:
            words.append(f"{name} was {theirs}, is {ours}")
    return "; ".join(words)


def _task(model: nn.Module, task: str | None) -> dict[str, Any]:
    registry = find_registry(model)
    if task is None or registry is None:
        shapes = {name: list(t.shape) for name, t in unwrapped(model).state_dict().items()}
        return {"model": type(unwrapped(model)).__name__, "shapes": _digest(json.dumps(shapes).encode())}
    spec = registry.task(task)
    return {
        "name": task,
        "methods": [str(p.method) for p in spec.placements],
        "sites": [list(p.sites) for p in spec.placements],
        "norms": spec.norms,
        "head": spec.head,
        "classes": spec.num_classes,
    }


def _backbone(model: nn.Module, task: str | None) -> dict[str, Any]:
    registry = find_registry(model)
    if task is None or registry is None:
        return {}
    return dict(fingerprint(unwrapped(model), registry.task(task).owned, registry.digests))


def _data(data: Batches) -> dict[str, Any]:
    if data.samples is None:
        return {"batches": len(data)}
    inputs, labels = data.samples.inputs, data.samples.labels
    columns: dict[str, Tensor | None] = inputs if isinstance(inputs, dict) else {"inputs": inputs}  # type: ignore[assignment]
    return {
        "samples": len(data.samples),
        **{f"digest of {k}": _digest(raw(t)) for k, t in {**columns, "labels": labels}.items() if t is not None},
    }


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
