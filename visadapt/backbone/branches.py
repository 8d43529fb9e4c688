"""Find the branches of any backbone in the dataflow of one forward.

In y = s + f(s) the branch f(s) is the summand computed from the other one (or, with a projection in the shortcut, the
one with more operators since the block's input), and it ends at the last module that computed it. Backbones without
sums concatenate their branches (DenseNet), or have none: then the ends are the outputs of the blocks that all data
flows through (VGG, Inception).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations

from torch import nn

from visadapt.backbone.axes import channel_axis
from visadapt.backbone.dataflow import Call, Flow, Join, Value
from visadapt.backbone.families.convs import is_depthwise
from visadapt.backbone.modules import (
    ancestors,
    is_matrix,
    joined,
    last_name,
    own_modules,
    parent,
    stacked_matrices,
    within,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}

_SCALES = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}

# operators that move or drop positions: an adapter treats all positions alike, so it can come before them
_MOVES = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "roll", "movedim", "swapaxes"),
    *("__getitem__", "pad", "unsqueeze", "squeeze", "expand", "clone", "to"),
}


@dataclass
class End:
    """Where a branch ends.

    Attributes:
        host: path of the module whose output it is.
        value: the output.
        block: path of the module in which the branch begins and ends.
        branch: paths of the block's children in the branch.
        axis: that the channels are on; None if it is not established.
    """

    host: str
    value: Value
    block: str
    branch: tuple[str, ...]
    axis: int | None


def ends(flow: Flow, modules: dict[str, nn.Module], skip: Iterable[str] = ()) -> list[End]:
    """Return the ends of residual branches, else of concatenated branches, else of blocks.

    Args:
        flow: recorded dataflow of one forward.
        modules: the backbone's modules by path.
        skip: modules to ignore, such as the head.
    """
    head = tuple(skip)
    reader = _Reader(flow, modules)
    for look in (reader.added, reader.entangled, reader.joined, reader.blocks):
        # a block around the head gives the logits
        around = [path for inner in head for path in ancestors(inner)] if look == reader.blocks else []
        found = [end for end in look() if not within(end.host, head) and end.host not in around]
        # weak branches (a positional convolution, a part of a re-parametrised conv) count only if there are no others
        for least in (0,) if look == reader.blocks else (2, 1, 0):
            strong = {end.host: end for end in found if reader.matrices(end.branch) >= least}
            if strong:
                return reader.with_siblings(strong, head)
    return []


class _Reader:
    def __init__(self, flow: Flow, modules: dict[str, nn.Module]) -> None:
        self.flow = flow
        self.modules = modules
        self.calls = flow.calls_of()

    def added(self) -> Iterator[End]:
        """y = s + f(s), or y = s + f(s) + g(s)."""
        sums = {join.output.index: join for join in self.flow.joins if join.adds}
        for join in sums.values():
            found = self._residual(join, whole=True)
            if found is not None:
                yield found
            yield from self._parallel(join, sums)

    def _parallel(self, join: Join, sums: dict[int, Join]) -> Iterator[End]:
        """The branches of a sum of three or more: GPT-NeoX adds attention and MLP of one input, and then that input."""
        for one, other in (join.parts, join.parts[::-1]):
            inner = sums.get(one.index)
            if inner is None or len(inner.parts) != 2:
                continue
            terms = (*inner.parts, other)
            for start in terms:
                branches = [term for term in terms if term is not start]
                if all(term.comes_from(start) for term in branches) and not any(
                    a.comes_from(b) for a, b in permutations(branches, 2)
                ):
                    ends = [self._end(join.stack, term, start) for term in branches]
                    yield from (end for end in ends if end is not None)

    def entangled(self) -> Iterator[End]:
        """y = s + f(s) in blocks with inputs computed from one another (NASNet's cells)."""
        for join in self.flow.joins:
            if join.adds:
                found = self._residual(join, whole=False)
                if found is not None:
                    yield found

    def joined(self) -> Iterator[End]:
        """y = [s, f(s)]: a value concatenated with one that it was computed from."""
        for join in self.flow.joins:
            for i, part in enumerate(join.parts):
                if not join.adds and any(part.comes_from(other) for other in join.parts[:i]):
                    found = self._end(join.stack, part, join.parts[0])
                    if found is not None:
                        block = self._whole(found.host, part)
                        yield End(found.host, found.value, block, (block,), found.axis)

    def blocks(self) -> Iterator[End]:
        """Modules of several layers, or else single layers, in a row that all data passes; innermost rows first."""
        passed = self._narrows()
        for least in (2, 1):
            chosen: list[End] = []
            for call in self.flow.calls:
                path, value = call.path, call.output
                row, name = parent(path), last_name(path)
                if value is None or value.index not in passed or value in call.inputs or not name:
                    continue
                if row and not isinstance(self.modules[row], _CONTAINERS):
                    continue
                if self._is_row(path, passed):
                    continue
                if self.matrices([path]) >= least and len(self.calls[path]) == 1:
                    chosen = [end for end in chosen if not within(path, [end.block])]
                    host = self._solid([p for p, _ in value.made_by if within(p, [path])])
                    chosen.append(End(host, value, path, (path,), channel_axis(value.axes)))
            if len(chosen) > 1:
                yield from chosen
                return

    def _is_row(self, path: str, passed: set[int]) -> bool:
        """Whether a container's layers form a row themselves, so that they are the blocks."""
        if not isinstance(self.modules[path], nn.Sequential):
            return False
        layers = [joined(path, name) for name in self.modules[path]._modules]
        outs = [self.calls[layer][0].output for layer in layers if layer in self.calls]
        return sum(out is not None and out.index in passed for out in outs) > 3

    def matrices(self, paths: Iterable[str]) -> int:
        """Number of weight matrices, without depthwise convolutions."""
        return sum(map(_matrices_of, {m for path in paths for m in own_modules(self.modules[path]).values()}))

    def with_siblings(self, found: dict[str, End], head: tuple[str, ...]) -> list[End]:
        """Add the same place in blocks of the same class that have no shortcut (the first of a stage)."""
        places: dict[type[nn.Module], dict[str, End]] = {}
        for end in found.values():
            if end.block not in ("", end.host):
                place = end.host.removeprefix(end.block)
                places.setdefault(type(self.modules[end.block]), {}).setdefault(place, end)
        taken = {end.block for end in found.values()}
        # containers of containers are of one class too
        values = {end.value.index for end in found.values()}
        for path, calls in self.calls.items():
            if path in taken or within(path, head) or not calls:
                continue
            for place, model in places.get(type(self.modules[path]), {}).items():
                host = path + place
                value = self.calls[host][0].output if host in self.calls else None
                if value is None or value.index in values:
                    continue
                if len(value.shape) == len(model.value.shape) and self._unique(host, path):
                    branch = tuple(path + b.removeprefix(model.block) for b in model.branch)
                    inside = tuple(b for b in branch if b in self.modules)
                    if self.matrices(inside) >= 1:
                        found[host] = End(host, value, path, inside, channel_axis(value.axes))
        return sorted(found.values(), key=lambda end: end.value.index)

    def _residual(self, join: Join, whole: bool) -> End | None:
        left, right = join.parts
        if left.comes_from(right):
            return self._end(join.stack, left, right, whole)
        if right.comes_from(left):
            return self._end(join.stack, right, left, whole)
        if left.depth == right.depth or self._is_scores(left) or self._is_scores(right):
            return None
        # with a projection in the shortcut the branch is the longer path from the common ancestor, within a block
        branch, shortcut = (left, right) if left.depth > right.depth else (right, left)
        shared = branch.ancestors & shortcut.ancestors
        start = self.flow.values[shared.bit_length() - 1]
        stack = tuple(c for c in join.stack[-2:] if c.path and any(start is v or start.comes_from(v) for v in c.inputs))
        return self._end(stack, branch, start, whole)

    def _is_scores(self, value: Value) -> bool:
        """Whether a value is a product of two others without channels, as scores of attention are.

        What HaloNet and BoTNet add to these, a function of the query, is not a branch.
        """
        *_, (source, _) = self._back(value)
        return source.op in _PRODUCTS and len(source.parents) > 1 and channel_axis(value.axes) is None

    def _end(self, stack: tuple[Call, ...], branch: Value, start: Value, whole: bool = True) -> End | None:
        """The end of ``branch`` in the innermost call that contains all of it, from ``start`` on."""
        for call in reversed(stack[-4:]):
            if whole and any(v.comes_from(start) for v in call.inputs):
                continue
            found = self._host(call.path, branch, start)
            if found is not None:
                host, value, axis = found
                return End(host, value, call.path, self._children(call.path, branch, start), axis)
        return None

    def _host(self, block: str, branch: Value, start: Value) -> tuple[str, Value, int | None] | None:
        """The outermost module below ``block`` that computed a value, ignoring later scalings and reorderings.

        After a scaling by a parameter, a module that passes the scaled value on (a drop-path) is preferred.
        """
        passing: tuple[str, Value, int | None] | None = None
        # a branch that mixes positions, as a mixer's tokens do, has its last weight's width where they were: the
        # channels are the stream's, which it is added to
        stream = channel_axis(start.axes) if start.shape == branch.shape else None
        mixes = stream is not None and channel_axis(branch.axes) not in (None, stream)
        for value, scaled in self._back(branch):
            below = [
                (path, passes)
                for path, passes in value.made_by
                if path != block and (not block or within(path, [block])) and self._unique(path, block)
            ]
            axis = stream if mixes else channel_axis(value.axes)
            if scaled and passing is not None:
                return passing
            made = [path for path, passes in below if not passes]
            if mixes and value.axes != branch.axes:
                continue
            if made:
                return self._solid(made), value, axis
            if below and passing is None:
                passing = below[0][0], value, axis
        return passing

    def _solid(self, made: list[str]) -> str:
        """The outermost module with this output that is not a container, since containers may not be called."""
        return next((p for p in reversed(made) if not isinstance(self.modules[p], _CONTAINERS)), made[-1])

    def _whole(self, host: str, value: Value) -> str:
        """The outermost module with the same output as ``host``, such as a container around it."""
        return next((p for p, passes in reversed(value.made_by) if not passes and within(host, [p])), host)

    def _back(self, value: Value) -> Iterator[tuple[Value, bool]]:
        """The value and its sources through moves and scalings; ``True`` once a scaling was passed."""
        scaled = False
        while True:
            yield value, scaled
            parents = [self.flow.values[i] for i in value.parents]
            if len(parents) == 1 and value.op in _MOVES:
                value = parents[0]
            elif len(parents) == 1 and value.op in _SCALES:
                value, scaled = parents[0], True
            elif len(parents) == 2 and value.op in ("sub", "__sub__") and parents[0].comes_from(parents[1]):
                # s + a·(f(s) − s)
                value, scaled = parents[0], True
            else:
                return

    def _unique(self, path: str, block: str) -> bool:
        # a drop-path shared by two branches cannot host the adapter of one of them
        return len(self.calls[path]) == max(1, len(self.calls.get(block, ())))

    def _children(self, block: str, branch: Value, start: Value) -> tuple[str, ...]:
        """The direct children of ``block`` inside the branch (or deeper modules, if the children are not called)."""
        found: dict[str, None] = {}
        at = f"{block}." if block else ""
        for call in self.flow.calls:
            out = call.output
            if out is None or call.path == block or not call.path.startswith(at) or within(call.path, found):
                continue
            if (out is branch or branch.comes_from(out)) and out.comes_from(start):
                found[call.path] = None
        return tuple(found)

    def _narrows(self) -> set[int]:
        """Values that every path from the input to the output goes through."""
        if not self.flow.values:
            return set()
        last = self.flow.values[-1]
        used = [v for v in self.flow.values if v is last or last.comes_from(v)]
        after: dict[int, int] = {}
        for value in used:
            for before in value.parents:
                after[before] = max(after.get(before, 0), value.index)
        reach = 0  # the last value that an earlier one flows into
        passed = set()
        for value in used:
            if reach <= value.index:
                passed.add(value.index)
            reach = max(reach, after.get(value.index, 0))
        return passed


def _matrices_of(module: nn.Module) -> int:
    if not is_matrix(module):
        return stacked_matrices(module)
    if isinstance(module, nn.RNNBase):
        # input to state, and state to state
        return 2
    return int(not is_depthwise(module))
