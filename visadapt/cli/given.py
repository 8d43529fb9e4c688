"""Which options the command line gives, so that one without effect is refused and not ignored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand

from visadapt.cli.terminated import terminable
from visadapt.errors import refuse_without_effect

_GIVEN: ContextVar[Mapping[str, str] | None] = ContextVar("given_options", default=None)
"""The options of the running command that were typed: how each is spelt, by the name of its parameter."""


class Command(TyperCommand):
    """A subcommand that knows which of its options were typed, and which have their defaults."""

    def invoke(self, ctx: Any) -> Any:
        typed = {
            parameter.name: max(parameter.opts, key=len)
            for parameter in self.params
            if getattr(ctx.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
        }
        token = _GIVEN.set(typed)
        try:
            # a server ends in its own way
            with nullcontext() if self.name == "serve" else terminable():
                return super().invoke(ctx)
        finally:
            _GIVEN.reset(token)


def given(*parameters: str) -> list[str]:
    """Return those of these options that were typed, spelt as on the command line.

    Args:
        *parameters: names of the command's parameters.
    """
    typed = _GIVEN.get() or {}
    return [typed[name] for name in parameters if name in typed]


def refuse_unused(why: str, *parameters: str) -> None:
    """Refuse options that have no effect here.

    Args:
        why: the reason, as a clause: ``"bundled/minilm takes texts"``.
        *parameters: names of the command's parameters that have no effect.

    Raises:
        VisadaptError: one of them was typed; it is named.
    """
    refuse_without_effect(given(*parameters), why)
