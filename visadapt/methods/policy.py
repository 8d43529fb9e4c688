"""What a task owns beside its adapters: norms and head."""

from typing import Literal, Protocol, get_args

from visadapt.backbone.heads import Head

NormPolicy = Literal["auto", "frozen", "affine", "full"]
HeadPolicy = Literal["auto", "new", "copy", "frozen"]

NORM_POLICIES = ("frozen", "affine", "full")
HEAD_POLICIES: tuple[str, ...] = get_args(HeadPolicy)


class Policy(Protocol):
    """What a method may read of the task that it builds parts for.

    Attributes:
        norms: one of ``NORM_POLICIES``.
        head: ``new``, ``copy`` or ``frozen``.
        head_at: where the task's own head is; None with a frozen head.
        owned: paths of the modules that the task replaces by its own: its head and those of ``train_also``.
    """

    norms: str
    head: str
    head_at: Head | None

    @property
    def owned(self) -> tuple[str, ...]: ...
