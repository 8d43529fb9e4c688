"""Write docs/performance.md and its figure from the measurements of ``python -m benchmarks``.

python docs/build/performance.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.figures import RESULTS, TOOK, chart, formatted, missed, read, table, with_goals
from visadapt.table import Table

TARGET = Path(__file__).parent.parent / "performance.md"

INTRO = """# Performance

Made by `python docs/build/performance.py` from the measurements of `python -m benchmarks`; no figure is typed by hand.
Each figure is a ratio of two contenders that alternated in one process, so that other load slowed both: the median over
the repeats, with quartiles. "By operations" is the same ratio if every multiplication of a convolution or matrix
product took equally long: norms, activations and the optimiser account for the difference. Bytes are those that
autograd keeps for the backward pass, counted through its saved-tensor hooks.

A *bottleneck* is `Bottleneck(m)` with frozen norms and `visadapt.lean(model)`; *own norms* is the default policy, under
which every norm's weight needs a gradient and so its input is kept; *bfloat16 kept* is
`visadapt.lean(model, keep=torch.bfloat16)`; *fused AdamW* is torch's AdamW in its fused form, the fastest on a CPU
too, with which every contender's steps then end, full fine-tuning's and those of other libraries as well.
"""


PRECISION = """Backbones kept in fewer bytes by `visadapt.lean` (`compute=torch.bfloat16`, `weights="int8"`), with a
task that was trained in float32. The memory is that of the whole backbone, as a fraction of float32's. The bundled
ResNet-50 is stored as 8-bit codes with a scale per output channel itself, so that int8 rounds none of its weights
again; MiniLM is stored in float32."""


def section(path: Path) -> str:
    """Make the section for one file of results."""
    rows = read(path)
    first = rows[0]
    kind = first["machine"].partition(",")[0] if first["device"] == "cpu" else first["device"]
    title = f"## {kind}, {first['threads']} threads, float32, torch {first['torch']}"
    measured_on = ", ".join(filter(None, (first["machine"], first["python"] and f"Python {first['python']}")))
    parts = [title, *([f"Measured on {measured_on}."] if measured_on else [])]
    parts += [
        f"![figures as fractions of their goals](performance/{path.stem}.svg)",
        table(rows).markdown(),
    ]
    reasons: dict[str, list[str]] = {}
    for goal, row in with_goals(rows):
        if missed(goal, row):
            reasons.setdefault(goal.why, []).append(f"{goal.figure}{goal.at and ', '}{goal.at} ({formatted(row)[0]})")
    if reasons:
        parts += ["Missed goals and their reasons (profiles below):"]
        parts += ["\n".join(f"* **{'; '.join(figures)}.** {why}" for why, figures in reasons.items())]
    parts += precisions(rows)
    profiles: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row["figure"].startswith("profile: "):
            _, contender, operator = row["figure"].split(": ", 2)
            profiles.setdefault(f"{contender}; {row['setting']}", []).append((operator, formatted(row)[0]))
    for step, shares in profiles.items():
        parts += [f"Profile of a step ({step}):", Table(("operator", "share"), shares).markdown()]
    hidden = ("profile: ", "precision: ", TOOK)
    others = [(r["figure"], r["setting"], *formatted(r)) for r in rows if not r["figure"].startswith(hidden)]
    parts += ["All measurements:", Table(("figure", "measured on", "median", "quartiles"), others).markdown()]
    return "\n\n".join(parts)


def precisions(rows: list[dict[str, str]]) -> list[str]:
    """Make the table of backbones kept in fewer bytes, beside fp32."""
    measures = [
        "accuracy",
        "other answers than float32",
        "largest difference of a logit / standard deviation of logits",
        "memory of the backbone",
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        kind, _, rest = row["figure"].partition(": ")
        if kind == "precision":
            measure, _, precision = rest.removesuffix(" / float32").rpartition(", ")
            cells.setdefault((row["setting"], precision), {})[measure] = formatted(row)[0]
    if not cells:
        return []
    body = [(*key, *(found.get(measure, "–") for measure in measures)) for key, found in cells.items()]
    return [PRECISION, Table(("task", "precision", *measures), body).markdown()]


def page() -> str:
    """Make the page."""
    return "\n".join([INTRO, *map(section, sorted(RESULTS.glob("performance-*.csv")))]) + "\n"


if __name__ == "__main__":
    for path in RESULTS.glob("performance-*.csv"):
        chart(read(path), TARGET.with_suffix("") / f"{path.stem}.svg")
    TARGET.write_text(page())
