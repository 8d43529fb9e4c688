"""The figures that have a goal, and the ratios of operations that limit them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A bound for a figure.

    Attributes:
        figure: name of the figure in the benchmarks.
        bound: the largest value that meets the goal, in the figure's unit.
        at: words that the setting must contain, for figures that are measured in several settings.
        limit: name of the figure with the same ratio in operations: the result if all operations took the same time.
        why: reason why the goal is missed, where it is.
        at_least: whether `bound` is the smallest value that meets the goal instead.
        cpu_only: whether the goal is one for the CPU.
    """

    figure: str
    bound: float
    at: str = ""
    limit: str = ""
    why: str = ""
    at_least: bool = False
    cpu_only: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:.4g}"


_RESNET = "operations: bottleneck / full fine-tuning"
_MERGED = "operations: merged and folded / plain backbone"
_UNMERGED = "operations: bottleneck m=32, lean / plain backbone"
_PREFIX = "operations: a later epoch on the prefix cache / the first (last stage adapted)"

_STEP = (
    "The forward pass and the backward pass to the first adapter need two of fine-tuning's three convolutions per "
    "layer, and adapters add a tenth: 0.73 of its operations. Folded norms and the backward pass of 1×1 "
    "convolutions as matrix products save further time; that fewer weights are updated saves little, as the fused "
    "AdamW takes little time for all of them. The remaining convolutions are torch's own and take most of the step "
    "(see the profile): half of fine-tuning's time is out of reach without faster ones."
)
_LORA = (
    "LoRA has the same number of operations (0.74 of fine-tuning's), in the same kernels of torch, and trains no norms "
    "either. Only the time of the norms, LoRA's second convolution per layer and the kept bytes can be saved."
)

_KEPT = (
    "The weight gradient of an adapter needs its input: the inputs of the 16 adapters alone, in bfloat16, are more "
    "than this goal. The activations' signs, at one bit each, are a tenth of what is kept."
)
_MIXED = (
    "At each of the 16 sites the weights of the batch's tasks are stacked, which reads and writes them once more than "
    "their products do: at this image size a task's weights are about as large as all outputs of an image that they "
    "act on. Each of the 53 norms computes a scale and a shift per channel and sample, where one task has them per "
    "channel."
)

_TAPS = (
    "The weight gradient of each rung's projection needs the output of the backbone's block: these outputs alone, in "
    "bfloat16, are nearly half of what is kept, and more than this goal. The rest is what the side blocks keep, at the "
    "resolution of each stage."
)
_SMALL = (
    "The gathers of each row's norms and adapters, and their products, are many small operators, and each costs a call "
    "from Python."
)
_OUTSIDE = (
    "The bare backbone spends time outside of operators as well: its own share and that of one task are listed with "
    "the other figures. A mixed batch adds the search for its tasks' tensors, the check that no task changed since the "
    "last batch, and the release of stacked weights."
)
_SIDE = (
    "A later epoch is the side network alone, forward and backward, and that has more than this goal of the first "
    "epoch's operations. They are depthwise convolutions and products at the resolution of each stage, which reading "
    "and writing limit more than the backbone's convolutions."
)
_EVERY = (
    "The backbone runs once. Each side network has its own features at the resolution of every stage, and its norms, "
    "gates and pooling are operators whose time is that of reading and writing these."
)
_TWICE = (
    "The decider needs the features of the bare backbone, and the chosen task then needs a forward pass of its own: "
    "two passes, however many tasks there are."
)
_BERT = (
    "The forward pass and the backward pass to the first adapter need two of fine-tuning's three products per layer; "
    "the rest is the attention, the norms and the adapters."
)
_HUB = "Both run the same products of the same backbone; what lean layers save is memory more than time."

_TASKS = (
    "The tensors of 64 tasks are 80 MB; what else the process holds, such as weights gathered for a batch, has not "
    "been taken apart."
)

_BF16 = "Without instructions for bfloat16, a CPU computes with it an order of magnitude more slowly than in float32."

_P95 = "serving: mixed tasks, p95 in Python at half load"
_QUEUE = (
    "A request that comes during a forward waits for its end, and then for its own. A simulated server that does "
    "nothing but these forwards, at the same random arrivals, misses the goal too, with whatever limit of the batch "
    "size suits it best (see the limit): half of the throughput of full batches is a higher load for small ones, "
    "which take more time per request."
)

GOALS = (
    Goal("step: bottleneck / full fine-tuning, both contiguous", 0.50, "224 px", _RESNET, _STEP),
    Goal("step: bottleneck / full fine-tuning, both contiguous", 0.50, "96 px", _RESNET, _STEP),
    Goal("step: bottleneck / full fine-tuning, each in its best format and precision", 0.50, "224 px", why=_STEP),
    Goal("step: bottleneck / full fine-tuning, each in its best format and precision", 0.60, "96 px", why=_STEP),
    Goal("step: bottleneck / peft LoRA, each in its best format and precision", 0.75, "224 px", why=_LORA),
    Goal("step: bottleneck / peft LoRA, each in its best format and precision", 0.75, "96 px", why=_LORA),
    Goal("step: ladder / full fine-tuning, each in its best format and precision", 0.30, "224 px"),
    Goal("bytes kept: ladder, bfloat16 / full fine-tuning", 0.03, "224 px", why=_TAPS),
    Goal("bytes kept: bottleneck / full fine-tuning", 0.30, "224 px"),
    Goal("bytes kept: bottleneck, bfloat16 kept / full fine-tuning", 0.12, "224 px", why=_KEPT),
    Goal("bytes kept: bottleneck, own norms, bfloat16 kept / full fine-tuning", 0.30, "224 px"),
    Goal(
        "step: bottleneck / full fine-tuning, BERT", 0.70, "", "operations: bottleneck / full fine-tuning, BERT", _BERT
    ),
    Goal("step: bottleneck / adapter-hub, BERT", 0.90, why=_HUB),
    Goal("inference: merged and folded / plain backbone, each in its best format", 0.90, limit=_MERGED),
    Goal(
        "inference: merged and folded, bfloat16 / plain backbone, each in its best format",
        0.60,
        why=_BF16,
        cpu_only=True,
    ),
    Goal("inference: bottleneck m=32, lean / plain backbone, each in its best format", 1.10, limit=_UNMERGED),
    Goal("mixed: 8 tasks in a batch of 8 / one task, own norms", 1.08, why=_MIXED),
    Goal("mixed: 64 tasks in a batch of 64 / one task, own norms", 1.08, why=_MIXED),
    Goal(
        "mixed: 64 tasks on one image by Ladder / one task",
        1.5,
        "m=8",
        "operations: 64 tasks on one image by Ladder / one task",
        _EVERY,
    ),
    Goal("mixed: time outside torch's operators", 10, "64 tasks", why=_OUTSIDE),
    Goal("mixed: graphs compiled for 100 random batches", 1),
    Goal(
        "prefix cache: a later epoch / the first (last stage adapted)",
        0.10,
        limit=_PREFIX,
        why="The last stage, forward and backward, has a quarter of the operations of the first epoch, which also runs "
        "the rest of the network forward once. These operations are faster than those of the earlier stages, but no "
        "cache can reach a tenth. With adapters in the last block only, a later epoch is well below the goal.",
    ),
    Goal(
        "prefix cache: a later epoch / the first (ladder)",
        0.05,
        limit="operations: a later epoch on the prefix cache / the first (ladder)",
        why=_SIDE,
    ),
    Goal("call: train() / plain", 2, "beside 1000 tasks"),
    Goal("call: auto / plain forward", 1.3, "500 tasks", why=_TWICE),
    *(
        goal
        for at in ("resnet50", "minilm")
        for goal in (
            Goal("serving: mixed tasks / bare backbone, throughput in Python", 0.80, at, "", _SMALL, at_least=True),
            Goal("serving: mixed tasks / bare backbone, throughput over HTTP", 0.80, at, "", _SMALL, at_least=True),
            Goal("serving: mixed tasks / bare backbone, memory", 1.30, at, "", _TASKS),
            Goal(f"{_P95} / a single forward", 3, at, f"{_P95} / a single forward, forwards only", _QUEUE),
        )
    ),
    Goal("inject", 50),
    Goal("switch", 1, "1000 tasks"),
    Goal(
        "load",
        20,
        "1000 tasks",
        why="The time does not grow with the number of tasks. Most of it is spent in Python: 70 parts are built and "
        "checked, 172 tensors are read, copied to aligned memory and assigned, and the backbone's 265 are checked for "
        "changes.",
    ),
    Goal("task file / bytes of its tensors", 1.01),
)


def goal_of(figure: str, setting: str, device: str = "cpu") -> Goal | None:
    """Return the goal of a figure in a setting on a device, or None."""
    fitting = (goal for goal in GOALS if goal.figure == figure and goal.at in setting)
    return next((goal for goal in fitting if device == "cpu" or not goal.cpu_only), None)
