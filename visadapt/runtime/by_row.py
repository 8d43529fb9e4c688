"""Mixed batches in a compiled graph: an operator fetches the rows' tensors, so one graph serves all compositions.

The graph is given one integer per sample, the number of its task. ``visadapt::rows`` looks up a tensor of each
row's task when the graph runs. Nothing else in the graph depends on the composition, as long as all tasks have one
profile; samples of the bare backbone may be among them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from visadapt.backbone.modules import CHILD
from visadapt.backbone.operators import CONV_FORWARDS, is_operator, operator_of
from visadapt.backbone.rows import Fact, Lying
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError
from visadapt.methods.stacking import in_groups, product
from visadapt.runtime.composition import Composition
from visadapt.runtime.hf_config import mixed_config
from visadapt.runtime.mixed_norms import is_stackable, norm_rowwise
from visadapt.runtime.profile import Profile, Step
from visadapt.runtime.registry import Named, Parts, Registry
from visadapt.runtime.roles import AROUND

_REGISTRIES: weakref.WeakValueDictionary[int, Registry] = weakref.WeakValueDictionary()


def named(registry: Registry, composition: Composition) -> Named:
    """Compose the tasks of the next batches, for eager mode or a compiled graph."""
    _REGISTRIES[registry._number] = registry
    tasks = Named.of(composition)
    with torch.inference_mode(False):
        tasks.numbers = torch.tensor([-1 if n is None else registry.task(n).number for n in composition.tasks])
        tasks.logits = torch.empty(_widest(registry, composition), 0)
    if "torch._dynamo" in sys.modules:
        # otherwise there would be one graph per width; who compiles has imported it
        torch._dynamo.maybe_mark_dynamic(tasks.logits, 0)  # type: ignore[no-untyped-call]
    if registry.configs:
        tasks.config = mixed_config(registry, tasks, registry.facts.model.__dict__["config"])
    return tasks


def facts_are_current(number: int) -> bool:
    """Return, while a graph is traced, whether the last eager batch ran with the model as it is now.

    Args:
        number: of the model's registry.
    """
    with _disable_current_modes():
        registry = _REGISTRIES.get(number)
        return registry is None or registry.facts.are_current()


# as torch.compiler.assume_constant_result does, which imports dynamo: seconds, for programs that compile nothing
facts_are_current._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _widest(registry: Registry, composition: Composition) -> int:
    """Number of classes of the widest head among a batch's tasks, as far as heads are linear."""
    own = 0
    head = registry.facts.head
    if head is not None:
        own = head.width(registry.facts.modules) or 0
    tasks = [None if name is None else registry.task(name) for name in composition.names]
    return max(own if task is None or task.num_classes is None else task.num_classes for task in tasks)


@torch.library.custom_op("visadapt::rows", mutates_args=())
def _rows(
    index: Tensor, model: int, path: str, part: str, name: str, shape: Sequence[int], fill: float, like: Tensor
) -> Tensor:
    """A tensor of each row's task, ``(N, …)``, in the dtype and on the device of ``like``.

    A row of the bare backbone has the host's own tensor of that name for a norm or a head, else zeros. Tensors shorter
    than ``shape`` are padded with ``fill``.
    """
    registry = _REGISTRIES[model]
    numbers = registry.by_number()
    host = registry.hosts[path]
    held = cast("Parts", host._modules[CHILD])
    found: dict[int, Tensor] = {}
    numbered = index.tolist()
    for number in dict.fromkeys(numbered):
        if number == -1:
            own = getattr(host, name, None) if part in ("norm", "head") else None
            own = host.weight.new_zeros(len(host.weight)) if fill and own is None else own  # type: ignore[arg-type, operator, union-attr]
        elif number not in numbers:
            raise VisadaptError("a task of this batch was removed: choose tasks that the model has")
        else:
            own = held[numbers[number]][part]
            *inside, last = name.split(".")
            for step in inside:
                own = getattr(own, step)
            # a head without a bias has zeros where another is padded
            own = own.weight.new_zeros(len(own.weight)) if fill and own.bias is None else getattr(own, last)
        if own is None:
            own = like.new_zeros(tuple(shape))
        elif tuple(own.shape) != tuple(shape):
            wide = own.new_full(tuple(shape), fill)
            wide[: len(own)] = own
            own = wide
        found[number] = own.to(device=like.device, dtype=like.dtype)
    return torch.stack([found[number] for number in numbered])


@_rows.register_fake
def _(
    index: Tensor, model: int, path: str, part: str, name: str, shape: Sequence[int], fill: float, like: Tensor
) -> Tensor:
    return like.new_empty((index.shape[0], *shape))


class Fetched:
    """`visadapt.methods.stacking.Own` of a part in a compiled graph."""

    def __init__(self, call: RowCall, part: str, shapes: Any, like: Tensor, inside: str = "") -> None:
        self._call, self._part, self._shapes, self._like, self._inside = call, part, shapes, like, inside
        self.samples = call.samples

    def __call__(self, name: str, repeat: bool = True) -> Tensor:
        whole = f"{self._inside}{name}"
        return self._call.fetch(self._part, whole, self._shapes[whole], self._like, repeat)

    def of(self, child: str) -> Fetched:
        return Fetched(self._call, self._part, self._shapes, self._like, f"{self._inside}{child}.")


class RowCall:
    """Fetches the rows of one tensor at one host: ``index`` is repeated as the samples lie there."""

    def __init__(self, tasks: Named, parts: Parts, tensor: Tensor, fact: Fact | None) -> None:
        assert tasks.numbers is not None
        repeat = tensor.shape[0] // tasks.numbers.shape[0]
        tiled = isinstance(fact, Lying) and bool(fact.tiled) and repeat > 1
        self.index = tasks.numbers.repeat(repeat) if tiled else tasks.numbers
        self.repeat = 1 if tiled else repeat
        self.samples = tensor.shape[0] // self.repeat
        self._parts = parts

    def fetch(
        self, part: str, name: str, shape: Sequence[int], like: Tensor, repeat: bool = True, fill: float = 0.0
    ) -> Tensor:
        """``(N, …)``: one per row, or one per sample."""
        registry = self._parts._registry
        found: Tensor = torch.ops.visadapt.rows(
            self.index, registry._number, self._parts._path, part, name, list(shape), fill, like
        )
        return found.repeat_interleave(self.repeat, 0) if repeat and self.repeat > 1 else found

    def keep(self, changed: Tensor, out: Tensor, repeat: bool = True) -> Tensor:
        """``changed``, with ``out`` in rows (or samples) of the bare backbone."""
        own = (self.index >= 0).to(out.device)
        own = own.repeat_interleave(self.repeat, 0) if repeat and self.repeat > 1 else own
        return torch.where(own.view(-1, *[1] * (changed.ndim - 1)), changed, out)


def run_by_row(host: nn.Module, plain: type[nn.Module], parts: Parts, tasks: Named, args: Any, kwargs: Any) -> Any:
    """A host's forward in a graph that does not depend on the composition; None if no such graph is possible.

    Args:
        host: the module.
        plain: its class.
        parts: what it carries.
        tasks: of the batch.
        args: of the host's forward.
        kwargs: of the host's forward.
    """
    profile: Profile | None = tasks.composition.only
    registry = parts._registry
    if profile is None or tasks.numbers is None or tasks.composition.training != registry.facts.model.training:
        return None
    steps = profile.steps.get(parts._path, ())
    known = registry.facts.batches.hosts.get(parts._path)
    if not steps:
        return plain.forward(host, *args, **kwargs)
    if known is None or not known.known or not args or not isinstance(args[0], Tensor):
        return None
    given = RowCall(tasks, parts, args[0], known.inputs.get((0, 0)))
    core = next((step for step in steps if step.role == "instead"), None)
    if any(not step.rowwise for step in steps if step is not core):
        return None

    def rowwise(step: Step, at: RowCall, value: Any, like: Tensor) -> Any:
        part: Any = profile.examples[parts._path][step.name]
        return part.rowwise(value, Fetched(at, step.name, profile.shapes[parts._path][step.name], _wide(like)))

    for step in steps:
        if step.role == "before":
            changed = rowwise(step, given, args, args[0])
            args = tuple(old if new is old else given.keep(new, old) for new, old in zip(changed, args, strict=True))
    x = args[0]
    weights = [step for step in steps if step.role == "weights"]
    out: Any = None
    if core is None and not weights:
        out = plain.forward(host, *args, **kwargs)
    elif len(args) == 1 and not kwargs:
        if core is not None and not weights:
            out = _instead(host, plain, core, given, tasks, x)
        elif core is None and len(weights) == 1:
            out = _operated(host, plain, given, x, lambda own: rowwise(weights[0], given, own, own["weight"]))
    if not isinstance(out, Tensor):
        return None
    rows = RowCall(tasks, parts, out, known.outputs.get(()))
    for step in steps:
        if step.role not in AROUND:
            continue
        at, tensor = (given, x) if step.role == "beside" else (rows, out)
        changed = rowwise(step, at, tensor, tensor)
        if step.role == "beside":
            changed = out + changed
        if step.role != "watch":
            out = rows.keep(changed, out)
    return out


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in the dtype of adapters, which stay in fp32 beside a half-precision backbone."""
    return tensor if tensor.dtype == torch.float64 else tensor.new_empty((), dtype=torch.float32)


def _operated(
    host: nn.Module, plain: type[nn.Module], rows: RowCall, x: Tensor, change: Callable[[dict[str, Tensor]], Any]
) -> Tensor | None:
    """A convolution or linear with each sample's own weights; None where its forward does more."""
    own: dict[str, Tensor] = {name: p for name, p in host._parameters.items() if p is not None}
    if not is_operator(host) or "weight" not in own or getattr(host, "padding_mode", "zeros") != "zeros":
        return None
    operator = operator_of(host, plain.__name__)
    if plain.forward not in (*CONV_FORWARDS, nn.Linear.forward) and not operator.transposed:
        return None
    each = {name: p.expand(rows.index.shape[0], *p.shape) for name, p in own.items()}
    for name, value in change(own).items():
        each[name] = rows.keep(value.to(own[name].dtype), own[name], False)
    weight, bias = each["weight"], each.get("bias")
    if not operator.conv:
        return product(weight.mT if operator.transposed else weight, bias, x, operator.layout, rows.samples)
    if rows.repeat > 1:
        weight = weight.repeat_interleave(rows.repeat, 0)
        bias = None if bias is None else bias.repeat_interleave(rows.repeat, 0)
    kernels, shifts = weight.flatten(0, 1), None if bias is None else bias.flatten()
    return in_groups(x, lambda flat: operator.apply(flat, kernels, shifts, operator.groups * x.shape[0]))


def _instead(
    host: nn.Module, plain: type[nn.Module], step: Step, rows: RowCall, tasks: Named, x: Tensor
) -> Tensor | None:
    """A norm or a linear head with each row's tensors."""
    if step.name == "norm":
        if step.looks != [plain_class(host), False, getattr(host, "eps", None)] or not is_stackable(host, plain):
            return None
        own = host._parameters | host._buffers

        def of(name: str) -> Tensor | None:
            value = own.get(name)
            return None if value is None else rows.fetch("norm", name, value.shape, value)

        return norm_rowwise(host, plain, of, x)
    if step.name != "head" or plain.forward is not nn.Linear.forward or step.looks[1] is not nn.Linear:
        return None
    linear = cast("nn.Linear", host)
    assert tasks.logits is not None
    k = tasks.logits.shape[0]
    weight = rows.fetch("head", "weight", (k, linear.in_features), linear.weight, False)
    bias = rows.fetch("head", "bias", (k,), linear.weight, False, -torch.inf)
    flat = x.reshape(rows.samples, -1, x.shape[-1])
    out = torch.baddbmm(bias[:, None], flat, weight.transpose(1, 2).to(flat.dtype))
    return out.view(*x.shape[:-1], k)
