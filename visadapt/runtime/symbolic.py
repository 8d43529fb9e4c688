"""Symbolic traces by torch.fx: a graph looks up the active task when it runs, as the model itself does.

A tracer runs a module's forward once, on proxies, and records its calls. The parts of the task that is active at that
moment must not become part of the graph: instead it calls the host, or the collection of the host's parts, which choose
when the graph runs.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.fx import Proxy

from visadapt.errors import VisadaptError
from visadapt.runtime.division import UnfitError
from visadapt.runtime.roles import AROUND, around, on_tensor, role

_INPUT = {"before", "instead"}
"""The roles of parts that decide whether the host's own forward runs, and on what."""


def proxy_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy | None:
    """The proxy of a tensor while torch.fx traces a module, if its first argument is one."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    return given if isinstance(given, Proxy) else None


def traced(host: nn.Module, plain: type[nn.Module], parts: Any, proxy: Proxy, args: Any, kwargs: Any) -> Any:
    """A host's forward for a tracer: its own operators, then a call of its parts; or a call of the host as a whole.

    Raises:
        VisadaptError: it is the model that is traced, and a task has another input for it, or stands instead of it.
    """
    tracer = cast("Any", proxy.tracer)
    roles = {role(part) for task in parts for part in parts[task].values()}
    if roles & _INPUT:
        if host is tracer.root:
            raise VisadaptError(
                f"torch.fx cannot trace this {type(host).__name__}, instead of whose forward a task has its own: trace "
                "visadapt.merge(model, task), or use torch.export"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(host), args, kwargs)
    out = plain.forward(host, *args, **kwargs)
    if not roles & set(AROUND):
        return out
    first = args[0] if args else None
    return on_tensor(out, lambda y: _call(tracer, parts, "around", y, first))


def traced_weight(host: nn.Module, parts: Any, name: str) -> Proxy | None:
    """The proxy of a host's parameter while torch.fx traces; None otherwise.

    A tracer patches ``nn.Module.__getattr__``, which this parameter's property bypasses.
    """
    own = nn.Module.__getattr__(host, name) if name in host._parameters else None
    return _call(cast("Any", own.tracer), parts, "weight", name) if isinstance(own, Proxy) else None


def _call(tracer: Any, parts: Any, what: str, *given: Any) -> Proxy:
    known = {name: len(task.hosts) for name, task in parts._registry.tasks.items()}
    return cast("Proxy", tracer.create_proxy("call_module", tracer.path_of_module(parts), (what, known, *given), {}))


def called(parts: Any, what: str, known: dict[str, int], *given: Any) -> Any:
    """The result of a host's parts where a graph calls them.

    Args:
        parts: of all tasks at the host.
        what: ``"around"`` (given the host's output and its first argument) or ``"weight"`` (given a parameter's name).
        known: number of hosts of each task when the graph was made.
        given: see ``what``.

    Raises:
        VisadaptError: a batch of mixed tasks is active, or a task that was injected after the graph was made.
    """
    registry = parts._registry
    if what == "weight":
        return getattr(registry.hosts[parts._path], given[0])
    task, (out, first) = registry.acting(), given
    if task is None:
        return out
    if not isinstance(task, str) or task not in registry.tasks:
        registry.check_current()
        raise VisadaptError("a graph of torch.fx runs one task at a time: give batches of mixed tasks to the model")
    own = parts._of(task)
    acting = [] if own is None else list(own.values())
    if known.get(task) != len(registry.tasks[task].hosts) or any(role(part) in _INPUT for part in acting):
        raise VisadaptError(f"this graph was traced before task {task!r} was as it is now: trace the model again")
    for part in acting:
        out = around(part, out, (first,))
    return out


def run_in_turn(parts: Any, out: Any) -> Any:
    """Run the parts of a host whose children were run one after the other, without calling the host.

    timm's checkpointing does so with the children of an ``nn.Sequential``.

    Args:
        parts: of all tasks at the host.
        out: the output of the last child, which is the host's.

    Raises:
        VisadaptError: the active task acts on more than the host's output.
        UnfitError: a batch of mixed tasks is active.
    """
    registry = parts._registry
    task = registry.acting()
    if task is not None and not isinstance(task, str):
        raise UnfitError(f"the children of {parts._path} were run one after the other, without calling it")
    own = None if task is None else parts._of(task)
    if own is None:
        if task is not None:
            registry.check_current()
        return out
    for part in own.values():
        if role(part) not in ("after", "watch"):
            raise VisadaptError(
                f"the children of {parts._path} were run one after the other, without calling it, but task {task!r} "
                "acts on more than its output: call it, or choose other modules with where="
            )
        out = around(part, out, ())
    return out
