"""What a task owns beside its adapters: norms and head."""

from typing import Protocol

NORM_POLICIES = ("frozen", "affine", "full")
HEAD_POLICIES = ("auto", "new", "copy", "frozen")


class Policy(Protocol):
    """What a method may ask of the task it builds parts for.

    Attributes:
        norms: one of ``NORM_POLICIES``.
        head: ``new``, ``copy`` or ``frozen``.
    """

    norms: str
    head: str
