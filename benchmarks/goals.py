"""The figures that have a goal, and the operations below which no figure can fall."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """What a figure should be at most.

    Attributes:
        figure: as the benchmarks name it.
        most: in the figure's unit.
        at: words that the setting must hold, where the figure is measured at several.
        limit: another figure: the same ratio by operations alone, as if all of them took the same time.
        why: where the time goes, to be read where the goal is missed.
    """

    figure: str
    most: float
    at: str = ""
    limit: str = ""
    why: str = ""


_RESNET = "operations: bottleneck / full fine-tuning"
_MERGED = "operations: merged and folded / plain backbone"
_UNMERGED = "operations: bottleneck m=32, lean / plain backbone"
_PREFIX = "operations: a later epoch on the prefix cache / the first (last stage adapted)"

_STEP = (
    "Forward and the way back to the first adapter are two of fine-tuning's three convolutions a layer, and adapters "
    "add a tenth: 0.73 of its operations. What is below that is won from norms that are folded, weights that the "
    "optimiser does not touch and 1×1 convolutions that go back as matrix products; the convolutions left are torch's "
    "own and four fifths of the step (see the profile), so half of fine-tuning is out of reach without quicker ones."
)
_LORA = (
    "LoRA has the same operations (0.74 of fine-tuning's), in the same kernels of torch, and no norm's weight to train "
    "either: what is left to win is the norms' own time, LoRA's second convolution of each layer and bytes kept."
)

GOALS = (
    Goal("step: bottleneck / full fine-tuning, both contiguous", 0.50, "224 px", _RESNET, _STEP),
    Goal("step: bottleneck / full fine-tuning, both contiguous", 0.50, "96 px", _RESNET, _STEP),
    Goal("step: bottleneck / full fine-tuning, each in its best format", 0.65, "224 px", _RESNET, _STEP),
    Goal("step: bottleneck / full fine-tuning, each in its best format", 0.65, "96 px", _RESNET, _STEP),
    Goal("step: bottleneck / peft LoRA, each in its best format", 0.75, "224 px", why=_LORA),
    Goal("step: bottleneck / peft LoRA, each in its best format", 0.75, "96 px", why=_LORA),
    Goal("bytes kept: bottleneck / full fine-tuning", 0.30, "224 px"),
    Goal("bytes kept: bottleneck, bfloat16 kept / full fine-tuning", 0.15, "224 px"),
    Goal("bytes kept: bottleneck, own norms, bfloat16 kept / full fine-tuning", 0.30, "224 px"),
    Goal("step: bottleneck / full fine-tuning, BERT", 0.70, limit="operations: bottleneck / full fine-tuning, BERT"),
    Goal("step: bottleneck / adapter-hub, BERT", 0.90),
    Goal("inference: merged and folded / plain backbone, each in its best format", 0.90, limit=_MERGED),
    Goal("inference: bottleneck m=32, lean / plain backbone, each in its best format", 1.10, limit=_UNMERGED),
    Goal("mixed: 8 tasks in a batch of 8 / one task, own norms", 1.15),
    Goal("mixed: 64 tasks in a batch of 64 / one task, own norms", 1.20),
    Goal(
        "prefix cache: a later epoch / the first (last stage adapted)",
        0.10,
        limit=_PREFIX,
        why="The last stage, forward and back, is a quarter of the operations of the first epoch, which runs the whole "
        "network forward once and the last stage like every other epoch. They are quicker ones than those below, but a "
        "tenth is out of reach of any cache. With the last block alone adapted a later epoch is well below that.",
    ),
    Goal("inject", 50),
    Goal("switch", 1, "1000 tasks"),
    Goal(
        "load",
        20,
        "1000 tasks",
        why="It does not grow with the number of tasks. Most of it is Python's: 70 parts are built and checked, 172 "
        "tensors read, copied to aligned memory and assigned, the backbone's 265 looked at for changes.",
    ),
    Goal("task file / bytes of its tensors", 1.01),
)


def goal_of(figure: str, setting: str) -> Goal | None:
    """What a figure should be at most, or None if nobody asked."""
    return next((goal for goal in GOALS if goal.figure == figure and goal.at in setting), None)
