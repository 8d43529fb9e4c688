"""Results as experiments write them, with invented scores: two networks, a few problems, methods and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from visadapt.experiments.record import Result, key_of

SIZES = {"resnet50": 23_508_032, "minilm": 10_620_288}
PROBLEMS = {"resnet50": ("cifar10", "fashion-mnist", "mnist"), "minilm": ("tweets", "movies", "cola")}
METHODS = {
    "linear probe": (0.0, -7.5),
    "norms only": (0.0023, -2.0),
    "biases": (0.0011, -2.6),
    "bottleneck m=8": (0.013, -0.9),
    "bottleneck m=32": (0.034, -0.2),
    "parallel": (0.0535, 0.1),
    "lora r=8": (0.027, -1.1),
    "top layers n=2": (0.3, -3.0),
    "full fine-tuning": (1.0, 0.0),
}
"""Trained fraction, and points relative to full fine-tuning."""


def result(
    experiment: str, network: str, problem: str, contender: str, seed: int, points: float, **more: Any
) -> Result:
    """Build a result whose score is 80 % plus ``points``."""
    fraction = more.pop("fraction", METHODS.get(contender, (0.02, 0))[0])
    facts = more.pop("facts", {})
    noise = 0.4 * math.sin(7 * seed + len(problem) + len(contender))
    fields = {
        "key": key_of(e=experiment, n=network, p=problem, c=contender, s=seed, f=facts, m=more),
        "experiment": experiment,
        "modality": "image" if network == "resnet50" else "text",
        "network": network,
        "problem": problem,
        "contender": contender,
        "seed": seed,
        "split": "test",
        "metric": "matthews" if problem == "cola" else "accuracy",
        "score": (80 + points + noise) / 100,
        "trained": round(fraction * SIZES[network]),
        "head": 20_490,
        "backbone": SIZES[network],
        "seconds": 60.0 + 10 * seed,
        "bytes": round(4 * fraction * SIZES[network]) + 80_000,
        "lr": 1e-3,
        "epochs": 3,
        "facts": facts,
        "machine": {"device": "cpu x86_64", "python": "3.11", "torch": "2.14.1", "commit": "abc1234"},
    }
    return Result(**{**fields, **more})


def all_results() -> list[Result]:
    """Build results of all experiments."""
    experiments = (compare, tradeoff, ablation, init_scale, sequence, transfer, modality, decathlon)
    return [each for experiment in experiments for each in experiment()]


def compare() -> Iterator[Result]:
    for network, problems in PROBLEMS.items():
        for number, problem in enumerate(problems):
            for name, (_, points) in METHODS.items():
                yield result("compare", network, problem, name, 0, points, split="validation")
                for seed in range(3):
                    yield result("compare", network, problem, name, seed, points * (1 + number / 3))


def tradeoff() -> Iterator[Result]:
    for network, problems in PROBLEMS.items():
        for problem in problems:
            for seed in range(3):
                for m in (2**i for i in range(10)):
                    points = -3 / math.sqrt(m) - (m > 300) * 0.4
                    yield result("tradeoff", network, problem, f"bottleneck m={m}", seed, points,
                                 facts={"m": m}, fraction=0.0023 + 0.0013 * m)  # fmt: skip
                for n in (1, 2, 4):
                    yield result("tradeoff", network, problem, f"top layers n={n}", seed, -6 / n,
                                 facts={"n": n}, fraction=0.12 * n)  # fmt: skip
                for name in ("norms only", "full fine-tuning"):
                    yield result("tradeoff", network, problem, name, seed, METHODS[name][1])


def ablation(layers: int = 6) -> Iterator[Result]:
    for network, problem in (("resnet50", "cifar10"), ("minilm", "tweets")):
        for norms in ("kept", "reverted"):
            spans = [None, *((i, j) for i in range(layers) for j in range(i, layers))]
            for span in spans:
                first, last = span or (None, None)
                lost = (
                    0.0 if span is None else sum(0.3 * 1.5**k for k in range(first, last + 1)) * (1 + (norms != "kept"))
                )
                facts = {"first": first, "last": last, "norms": norms, "majority": 0.6}
                yield result("ablation", network, problem, "bottleneck m=64", 0, -lost, facts=facts, split="validation")


def init_scale() -> Iterator[Result]:
    for network, problem in (("resnet50", "cifar10"), ("minilm", "tweets"), ("minilm", "cola")):
        for power in range(-7, 1):
            for seed in range(3):
                lost = 0.0 if power < -1 else 4.0 + 8 * power + 8
                facts = {"std": 10.0**power, **({"stopped": "the loss became nan"} if power == 0 and seed == 2 else {})}
                yield result(
                    "init_scale", network, problem, "bottleneck m=64", seed, -lost, facts=facts, split="validation"
                )


def sequence() -> Iterator[Result]:
    problems = PROBLEMS["resnet50"]
    for name in ("bottleneck m=8", "full fine-tuning", "sequential fine-tuning"):
        fraction = 1.0 if "full" in name else 0.013
        for seed in range(2):
            for position, after in enumerate(problems):
                for number, problem in enumerate(problems[: position + 1]):
                    shared = name.startswith("sequential")
                    lost = 15.0 * (position - number) * shared
                    total = 1.002 if shared else 1 + fraction * (position + 1)
                    outputs = f"{name}{seed}{problem}{position if shared else ''}"
                    facts = {"position": position, "after": after, "total": total, "outputs": outputs}
                    yield result(
                        "sequence", "resnet50", problem, name, seed, -lost + (0 if shared else 0.0), facts=facts
                    )


def transfer() -> Iterator[Result]:
    for network, problems in PROBLEMS.items():
        for a, target in enumerate(problems):
            for b, source in enumerate((None, *problems)):
                if source != target:
                    for seed in range(2):
                        gain = 0.0 if source is None else 1.4 * math.cos(3 * a + 2 * b)
                        yield result(
                            "transfer", network, target, "bottleneck m=8", seed, gain, facts={"source": source}
                        )


def modality() -> Iterator[Result]:
    for network, problems in PROBLEMS.items():
        layers = 16 if network == "resnet50" else 6
        for problem in problems:
            for seed in range(2):
                for name, (_, points) in METHODS.items():
                    yield result("modality", network, problem, name, seed, points)
                for k in [k for k in (1, 2, 4, 8) if k < layers]:
                    for end in ("first", "last"):
                        points = -4.0 / k if end == "first" else -1.5 / k
                        facts = {"where": f"{end} {k}", "k": k, "layers": layers}
                        yield result(
                            "modality", network, problem, f"bottleneck m=8, {end} {k}", seed, points, facts=facts
                        )
                facts = {"where": "all", "k": layers, "layers": layers}
                yield result("modality", network, problem, "bottleneck m=8, all", seed, 0, facts=facts)


def decathlon() -> Iterator[Result]:
    problems = PROBLEMS["resnet50"]
    for name, total in (("bottleneck m=8", 760.0), ("parallel", 790.0), ("full fine-tuning", 750.0)):
        for seed in range(3):
            for problem in problems:
                yield result("decathlon", "resnet50", problem, name, seed, METHODS[name][1])
            facts = {"problems": list(problems), "total": 1.2}
            yield result(
                "decathlon", "resnet50", "all", name, seed, 0, metric="decathlon", score=total + seed, facts=facts
            )
