"""Heads: the modules at a backbone's end that belong to a problem."""

from visadapt.backbone.heads.head import Final, Head, is_final, width_of
from visadapt.backbone.heads.known import CLASS_COUNTS, find_head
from visadapt.backbone.heads.named import head_at, modules_at
from visadapt.backbone.heads.traced import head_of_flow, traced_head, with_auxiliary

__all__ = [
    "CLASS_COUNTS",
    "Final",
    "Head",
    "find_head",
    "head_at",
    "head_of_flow",
    "is_final",
    "modules_at",
    "traced_head",
    "width_of",
    "with_auxiliary",
]
