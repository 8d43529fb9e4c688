"""A method, as a command line spells it."""

from __future__ import annotations

from visadapt.checks import check_choice
from visadapt.cli.options import number, pairs
from visadapt.methods import METHODS, Method


def chosen(name: str, m: str | None, options: list[str] | None) -> Method:
    """The method of that name with ``--m`` and ``--option KEY=VALUE``.

    Raises:
        VisadaptError: no such method, no such option of it, or a value that it does not take.
    """
    check_choice(name, METHODS, "method")
    return METHODS[name].of({**({} if m is None else {"m": number(m)}), **pairs(options, "--option")})
