"""Record the dataflow of one forward: which module computed which tensor from which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.axes import Axes
from visadapt.backbone.axis_tracker import AxisTracker

_ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}

_JOINS = {"cat", "concat", "concatenate"}


@dataclass
class Value:
    """A tensor at one moment; an in-place operator makes a new value of the same tensor.

    Attributes:
        index: position in the order of appearance.
        shape: shape of the tensor.
        depth: number of operators on the longest path from the input.
        ancestors: all values that it was computed from, as a bit mask of their indices.
        parents: indices of the operator's inputs.
        op: name of the operator.
        weighed: whether the operator took a parameter.
        axes: what is known of its axes; None if they were not followed.
        made_by: the modules whose output it is, innermost first, each with whether the module only passes it through.
    """

    index: int
    shape: tuple[int, ...]
    depth: int
    ancestors: int
    parents: tuple[int, ...]
    op: str
    weighed: bool = False
    axes: Axes | None = None
    made_by: list[tuple[str, bool]] = field(default_factory=list)

    def comes_from(self, other: Value) -> bool:
        """Whether this value was computed from ``other``."""
        return bool(self.ancestors >> other.index & 1)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: path of the module.
        inputs: the values among its arguments.
        output: the first tensor of its output, or None if that is not a recorded value.
        shape: shape of the first tensor of its output, recorded or not; None if there is no tensor.
        alone: whether its output is that tensor, and not a tuple or list that begins with it.
    """

    path: str
    inputs: tuple[Value, ...]
    output: Value | None = None
    shape: tuple[int, ...] | None = None
    alone: bool = False


@dataclass
class Join:
    """A sum or concatenation of several values.

    Attributes:
        stack: the calls that were active, outermost first.
        parts: the values that are added or concatenated.
        output: their sum or concatenation.
        adds: whether they are added.
    """

    stack: tuple[Call, ...]
    parts: tuple[Value, ...]
    output: Value
    adds: bool


class Flow(TorchFunctionMode):
    """Records one forward of a model whose modules were hooked by `watch`.

    Attributes:
        values: the tensors that depend on the input, in the order of appearance.
        calls: of modules, in the order in which they began.
        joins: the sums and concatenations.
        axes: what is known of the axes of tensors.
        outputs: the values among the model's output.
        read: paths of modules whose parameters other code computed with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.joins: list[Join] = []
        self.axes = AxisTracker()
        self.outputs: tuple[Value, ...] = ()
        self.read: set[str] = set()
        self._owners: dict[int, set[str]] = {}
        self._stack: list[Call] = []
        self._now: dict[int, Value] = {}
        # keep tensors alive, so that ids stay unique
        self._alive: list[Tensor] = []

    def watch(self, modules: dict[str, nn.Module]) -> None:
        """Hook the modules permanently; use it only on a temporary copy."""
        for path, module in modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), set()).add(path)
            module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def start(self, given: Any) -> None:
        """Mark the tensors of an example as the inputs."""
        tensors = _tensors(given)
        self.axes.start(tensors)
        for tensor in tensors:
            self._note(tensor, (), "input")

    def known(self, tensors: Iterable[Tensor]) -> tuple[Value, ...]:
        """Return the values of those tensors that depend on the input."""
        return tuple(self._now[id(t)] for t in tensors if id(t) in self._now)

    def forget(self) -> Flow:
        """Let go of the tensors; return what was recorded of them."""
        self._now.clear()
        self._alive.clear()
        self.axes.forget()
        return self

    def calls_of(self) -> dict[str, list[Call]]:
        """Return all calls by module path."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.path, []).append(call)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = func(*args, **kwargs)
            # .T, .mT and .data are tensors; most attributes, such as .shape, are not
            if isinstance(attribute, Tensor) and id(attribute) not in self._now and self.known(args[:1]):
                self._note(attribute, self.known(args[:1]), "permute")
            return attribute
        inputs = _tensors((args, kwargs))
        known = self.known(inputs)
        before = {id(t): self._now[id(t)] for t in inputs if id(t) in self._now}
        parts = self._parts(name, args)
        out = func(*args, **kwargs)
        self._note_reads(inputs, out)
        if not known:
            return out
        inplace = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or kwargs.get("inplace")
        value = None
        for tensor in _tensors(out):
            if id(tensor) in before and not inplace:
                continue  # returned unchanged, as by dropout in eval mode
            value = self._note(tensor, known, name)
            value.weighed = any(isinstance(t, nn.Parameter) for t in inputs)
        if parts and value is not None:
            self.joins.append(Join(tuple(self._stack), parts, value, name in _ADDS))
        return out

    def _note_reads(self, inputs: list[Tensor], out: Any) -> None:
        """Note the modules whose parameters an operator takes while none of the modules that own them runs."""
        owners = [self._owners[id(tensor)] for tensor in inputs if id(tensor) in self._owners]
        if owners and _tensors(out):  # not a look at a shape
            running = {call.path for call in self._stack}
            self.read |= set().union(*(own for own in owners if running.isdisjoint(own)))

    def _parts(self, name: str, args: Any) -> tuple[Value, ...]:
        if name in _ADDS and len(args) > 1 and all(isinstance(a, Tensor) for a in args[:2]):
            return self.known(args[:2]) if all(id(a) in self._now for a in args[:2]) else ()
        if name in _JOINS and args and isinstance(args[0], list | tuple):
            return self.known(a for a in args[0] if isinstance(a, Tensor))
        return ()

    def _note(self, tensor: Tensor, parents: tuple[Value, ...], op: str) -> Value:
        ancestors = 0
        for parent in parents:
            ancestors |= parent.ancestors | 1 << parent.index
        depth = 1 + max((p.depth for p in parents), default=-1)
        indices = tuple(p.index for p in parents)
        axes = self.axes.of(tensor)
        value = Value(len(self.values), tuple(tensor.shape), depth, ancestors, indices, op, axes=axes)
        self.values.append(value)
        self._now[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path, self.known(_tensors((args, kwargs))))
            self.calls.append(call)
            self._stack.append(call)

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        call = self._stack.pop()
        first = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(first, Tensor):
            return
        call.shape, call.alone = tuple(first.shape), first is out
        if id(first) not in self._now and call.inputs:
            # the dataflow inside a custom autograd.Function is not visible
            self._note(first, call.inputs, "call").weighed = any(True for _ in module.parameters())
        value = self._now.get(id(first))
        if value is not None:
            call.output = value
            value.made_by.append((call.path, value in call.inputs))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def record(model: nn.Module, modules: dict[str, nn.Module], run: Any, given: Any) -> Flow:
    """Run a temporary copy of a backbone once and record its dataflow.

    Args:
        model: the copy.
        modules: its modules by path.
        run: calls the model with ``given``.
        given: the example, as fake tensors.
    """
    flow = Flow()
    flow.watch(modules)
    flow.start(given)
    try:
        with torch.no_grad(), flow.axes, flow:
            flow.outputs = flow.known(_tensors(run(model, given)))
    except BaseException:
        # the hooks of the copy hold what was recorded, in a cycle
        flow.forget()
        raise
    return flow
