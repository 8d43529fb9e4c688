"""Generation for batches of mixed tasks, by transformers' ``generate``: one task per prompt, with any number of beams.

The rows of its forwards follow from two methods: one encodes the prompts, another repeats them for beams and return
sequences. The class of a whole model overrides both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import Axis, Key, leaves
from visadapt.backbone.modules import REGISTRY
from visadapt.backbone.rows import Fact, Lying
from visadapt.backbone.subclass import ModuleClass, cached, subclass
from visadapt.errors import VisadaptError
from visadapt.runtime.choice import AUTO
from visadapt.runtime.divided import CacheError
from visadapt.runtime.division import Division, UnfitError, grouped
from visadapt.runtime.door import is_outside
from visadapt.runtime.registry import Registry

_EXPAND = "_expand_inputs_for_generation"
"""Repeats every prompt, once per beam or return sequence."""

_ENCODE = ("_prepare_text_encoder_decoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation")
"""Runs the encoder on the prompts; its name depends on the version of transformers."""


class _Generation:
    """One call of ``generate`` with one task per prompt."""

    def __init__(self, model: nn.Module, registry: Registry, tasks: tuple[str | None, ...]) -> None:
        self.model, self.registry, self.tasks = model, registry, tasks
        self.stack = contextlib.ExitStack()

    def check(self, prompts: int) -> None:
        """Compare the number of tasks with that of prompts."""
        if prompts != len(self.tasks):
            raise VisadaptError(
                f"{len(self.tasks)} tasks were named for {prompts} prompts: name one per prompt, however many beams or "
                "return sequences each has"
            )

    def divided(self) -> tuple[list[str | None], Division]:
        """The distinct tasks, and the prompts of each."""
        distinct, number, prompts = grouped(self.tasks)
        return distinct, Division(number, type(self.model).__name__, prompts)


_RUNNING: ContextVar[_Generation | None] = ContextVar("visadapt_generation", default=None)


def generates(cls: ModuleClass) -> bool:
    """Whether models of a class generate as transformers' do."""
    return hasattr(cls, "generate") and hasattr(cls, _EXPAND)


@cached
def generating_class(plain: ModuleClass) -> ModuleClass:
    """A subclass whose ``generate`` takes batches of mixed tasks."""
    kind: Any = plain

    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registry: Registry | None = self.__dict__.get(REGISTRY)
        tasks: Any = None if registry is None else registry.current()
        if registry is None or not is_outside(tasks):
            return kind.generate(self, *args, **kwargs)
        if tasks == AUTO:
            raise VisadaptError(
                "'auto' would choose anew for every token: let visadapt.decide(model, prompts) choose the tasks, and "
                "generate within using(model, tasks)"
            )
        running = _Generation(self, registry, tasks)
        token = _RUNNING.set(running)
        try:
            with running.stack:
                return kind.generate(self, *args, **kwargs)
        except CacheError:
            pass  # its forwards run one task at a time, and tasks cannot share a cache: generate one task at a time
        finally:
            _RUNNING.reset(token)
        return _one_by_one(running, kind.generate, args, kwargs)

    def expand(self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        running = _running(self)
        if running is not None:
            if isinstance(kwargs.get("input_ids"), Tensor):
                running.check(kwargs["input_ids"].shape[0])
            rows = tuple(task for task in running.tasks for _ in range(expand_size))
            running.stack.enter_context(running.registry.only(rows))
        return getattr(super(own, self), _EXPAND)(expand_size, *args, **kwargs)

    members: dict[str, Any] = {"generate": update_wrapper(generate, kind.generate), _EXPAND: expand}
    for name in _ENCODE:
        if hasattr(plain, name):
            members[name] = _encoding(plain, name)
    own = subclass(plain, generating_class, **members)
    return own


def _running(model: nn.Module) -> _Generation | None:
    running = _RUNNING.get()
    return running if running is not None and running.model is model else None


def _encoding(plain: ModuleClass, name: str) -> Callable[..., Any]:
    """Runs the encoder one task at a time: it is called once, and by itself."""

    def encode(self: nn.Module, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plainly, running = getattr(plain, name), _running(self)
        if running is None:
            return plainly(self, inputs_tensor, model_kwargs, *args, **kwargs)
        running.check(inputs_tensor.shape[0])
        distinct, division = running.divided()
        outs, facts = [], _first_axis((inputs_tensor, model_kwargs))
        for number, task in enumerate(distinct):
            own_prompts, own_kwargs = division.share((inputs_tensor, model_kwargs), facts, number)
            with running.registry.within(task):
                outs.append(plainly(self, own_prompts, dict(own_kwargs), *args, **kwargs)["encoder_outputs"])
        encoded = {key: Lying(0) for key, leaf in leaves(outs[0]) if isinstance(leaf, Tensor)}
        model_kwargs["encoder_outputs"] = division.join(outs, encoded)
        return model_kwargs

    return encode


def _first_axis(given: Any) -> Mapping[Key, Fact | Axis]:
    """Samples lie along the first axis of all inputs of ``generate``, where it repeats them for beams."""
    return {key: 0 for key, leaf in leaves(given) if isinstance(leaf, Tensor) and leaf.ndim}


def _one_by_one(running: _Generation, generate: Any, args: Any, kwargs: Any) -> Tensor:
    """Generate for one task at a time; shorter sequences are padded as ``generate`` pads them.

    Raises:
        VisadaptError: the call asks for more than the sequences.
    """
    distinct, division = running.divided()
    outs: list[Tensor] = []
    for number, task in enumerate(distinct):
        try:
            own_args, own_kwargs = division.share((args, kwargs), _first_axis((args, kwargs)), number)
        except UnfitError as error:
            raise VisadaptError(f"this generation runs one task at a time, and {error}") from error
        with running.registry.within(task):
            out = generate(running.model, *own_args, **own_kwargs)
        if not isinstance(out, Tensor):
            raise VisadaptError(
                f"this generation runs one task at a time, and a {type(out).__name__} cannot be put together from "
                "several tasks': leave out return_dict_in_generate, or generate for one task at a time"
            )
        outs.append(out)
    longest = max(out.shape[1] for out in outs)
    pad = _pad(running.model, kwargs)
    padded = [nn.functional.pad(out, (0, longest - out.shape[1]), value=pad) for out in outs]
    rows = division.rows(sum(map(len, padded)), padded[0].device, Lying(0, 2, False))
    return rows.join(padded)


def _pad(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """The token that ``generate`` writes after the end of a sequence."""
    configs = [
        config for config in (kwargs.get("generation_config"), getattr(model, "generation_config", None)) if config
    ]
    for name in ("pad_token_id", "eos_token_id"):
        for value in (kwargs.get(name), *(getattr(config, name, None) for config in configs)):
            if value is not None:
                return int(torch.as_tensor(value).flatten()[0])
    return 0
