"""The sections' findings, tables and claims for results with known scores."""

from __future__ import annotations

import dataclasses

import pytest

from tests.report import fake_results
from visadapt import VisadaptError
from visadapt.experiments.catalogue import is_adapter
from visadapt.report import Look, build
from visadapt.report.ablation import ablation
from visadapt.report.compare import compare
from visadapt.report.crossmodal import crossmodal
from visadapt.report.decathlon import decathlon
from visadapt.report.formatting import file_name, join_words, mean_and_std, signed, two_digits
from visadapt.report.init_scale import init_scale
from visadapt.report.modality import modality
from visadapt.report.sequence import SHARED, sequence
from visadapt.report.statistics import gaps_to_full
from visadapt.report.tradeoff import tradeoff
from visadapt.report.transfer import transfer


def at(experiment: str, contender: str, score: float, **more) -> fake_results.Result:
    """Build a result with exactly this score in %."""
    options = {"network": "resnet50", "problem": "cifar10", "seed": 0, **more}
    return fake_results.result(experiment, contender=contender, points=0, score=score / 100, **options)


def of_seeds(results: list[fake_results.Result], count: int = 3) -> list[fake_results.Result]:
    """Repeat results of one seed for others, so that intervals are narrow."""
    return [dataclasses.replace(r, seed=seed) for r in results for seed in range(count)]


def test_compare_takes_the_mean_over_problems() -> None:
    results = [
        at("compare", "full fine-tuning", 90),
        at("compare", "full fine-tuning", 80, problem="mnist"),
        at("compare", "bottleneck m=8", 89),
        at("compare", "bottleneck m=8", 78, problem="mnist"),
        at("compare", "bottleneck m=8", 80, problem="mnist", seed=1),
    ]
    assert gaps_to_full(results) == {"full fine-tuning": 0, "bottleneck m=8": pytest.approx(-1)}
    section = compare(results)
    assert "mean over problems: bottleneck m=8 at −1.0 points with 1.3 % on resnet50" in section.finding
    (table,) = section.tables
    assert [row[:4] for row in table.rows] == [
        ("full fine-tuning", "90.0", "80.0", "85.0"),
        ("bottleneck m=8", "89.0", "79.0 ± 1.4", "84.0"),
    ]
    assert "bottleneck m=8 −1.0" in section.drawings[0].alt


def test_the_claim_is_tested_with_the_adapter_that_is_best_on_validation_data() -> None:
    def results(chosen: float) -> list[fake_results.Result]:
        scores = {
            "bottleneck m=8": (85, chosen),
            "lora r=8": (84, 91),
            "parallel": (99, 99),
            "full fine-tuning": (80, 90),
        }
        return [
            at("compare", name, score, split=split)
            for name, pair in scores.items()
            for split, score in zip(("validation", "test"), pair, strict=True)
        ]

    (holds,), (fails,) = (compare(of_seeds(results(score))).claims for score in (89.7, 89.5))
    assert (holds.holds, fails.holds) == (True, False)
    assert holds.measured == ("bottleneck m=8: −0.3 points at 1.3 %, mean of 1 problem, 95 % interval −0.3 to −0.3")
    assert holds.training_runs == 6
    (open_claim,) = compare(results(89.7)).claims
    assert (open_claim.holds, open_claim.verdict) == (None, "cannot be decided")
    # parallel is better on both splits, but trains 5.35 %
    assert holds.case == "image"


def test_validation_scores_count_at_the_rate_with_all_seeds() -> None:
    def trials(name: str, points: float, seeds: int, lr: float) -> list[fake_results.Result]:
        return [at("compare", name, points, split="validation", seed=seed, lr=lr) for seed in range(seeds)]

    results = [
        *(at("compare", name, 80, split="test") for name in ("bottleneck m=8", "lora r=8", "full fine-tuning")),
        # one good trial at another rate does not make a method the best
        *trials("bottleneck m=8", 84, 3, 1e-3),
        *trials("bottleneck m=8", 99, 1, 3e-3),
        *trials("lora r=8", 85, 3, 1e-3),
    ]
    (claim,) = compare(results).claims
    assert claim.measured.startswith("lora r=8: ")


@pytest.mark.parametrize(("points", "holds"), [(82, True), (80, False)])
def test_a_nonlinear_bottleneck_against_a_linear_one_of_its_size(points: float, holds: bool) -> None:
    results = [
        at("compare", name, points if name == "bottleneck m=8" else 81, problem=problem)
        for name in ("bottleneck m=8", "bottleneck m=8 activation=None", "bottleneck m=32")
        for problem in ("cifar10", "mnist")
    ]
    (claim,) = compare(results).claims
    assert claim.holds is holds
    sign, better = ("+", 2) if holds else ("−", 0)
    assert claim.measured == (
        f"bottleneck m=8: {sign}1.0 points at equal parameters, mean of 2 pairs; better in {better}, 95 % interval "
        f"{sign}1.0 to {sign}1.0"
    )
    assert claim.training_runs == 4


def test_a_contender_without_validation_results_on_all_problems_is_not_chosen() -> None:
    results = [
        at("compare", name, 90, problem=problem, split=split)
        for name in ("bottleneck m=8", "full fine-tuning")
        for problem in ("cifar10", "mnist")
        for split in ("validation", "test")
        if (name, problem, split) != ("bottleneck m=8", "mnist", "validation")
    ]
    assert compare(results).claims == ()


def test_a_mean_over_fewer_problems_is_marked_and_is_not_the_best() -> None:
    results = [
        at("compare", name, score, problem=problem)
        for name, score in (("full fine-tuning", 80), ("bottleneck m=8", 79), ("series", 85))
        for problem in ("cifar10", "mnist")
        if (name, problem) != ("series", "mnist")
    ]
    section = compare(results)
    assert "bottleneck m=8 at −1.0" in section.finding
    (drawing,) = section.drawings
    assert "series +5.0 (1 problem); full fine-tuning 0.0; bottleneck m=8 −1.0." in drawing.alt


def test_tradeoff() -> None:
    def results(wide: float) -> list[fake_results.Result]:
        return [
            at("tradeoff", "full fine-tuning", 90),
            at("tradeoff", "norms only", 85),
            *(
                at("tradeoff", f"bottleneck m={m}", score, facts={"m": m}, fraction=m / 1000)
                for m, score in ((1, 80), (8, 89), (256, wide))
            ),
            *(
                at("tradeoff", f"top layers n={n}", score, facts={"n": n}, fraction=n / 5)
                for n, score in ((1, 86), (2, 88.5))
            ),
        ]

    section = tradeoff(results(89.5))
    flat, fewer = section.claims
    assert (flat.holds, flat.measured) == (None, "0.5 points between m = 256 and m = 8, of 2 widths")
    assert (fewer.holds, fewer.measured) == (None, "top 2: −1.5 points at 40 %; adapters reach it at 0.8 %")
    assert [claim.holds for claim in tradeoff(of_seeds(results(89.5))).claims] == [True, True]
    assert [claim.training_runs for claim in tradeoff(of_seeds(results(89.5))).claims] == [6, 6]
    assert [row[0] for row in section.tables[0].rows][:3] == ["bottleneck m=1", "norms only", "bottleneck m=8"]
    flat, _ = tradeoff(results(87)).claims
    assert flat.measured == "2.0 points between m = 8 and m = 256, of 2 widths"
    assert tradeoff(of_seeds(results(87))).claims[0].holds is False
    second_seed = at("tradeoff", "bottleneck m=8", 87, facts={"m": 8}, fraction=8 / 1000, seed=1)
    flat, _ = tradeoff([*results(87), second_seed]).claims
    assert flat.measured == ("1.0 points between m = 8 and m = 256, of 2 widths; standard deviation over seeds ± 1.4")


def test_ablation() -> None:
    spans = {None: 90, (0, 0): 89.5, (1, 1): 87, (0, 1): 62}
    results = [
        at("ablation", "bottleneck m=64", score - (norms == "reverted"), split="validation", modality="text",
           facts={"first": span and span[0], "last": span and span[1], "norms": norms, "majority": 0.6})
        for norms in ("kept", "reverted")
        for span, score in spans.items()
    ]  # fmt: skip
    assert {claim.holds for claim in ablation(results).claims} == {None}
    section = ablation(of_seeds(results))
    single, lower, majority = section.claims
    assert {claim.training_runs for claim in section.claims} == {3}
    assert (single.holds, single.measured) == (
        False, "the worst layer costs −3.0 points, mean of 3 trained tasks, 95 % interval −3.0 to −3.0"
    )  # fmt: skip
    assert (lower.holds, lower.measured) == (True, "mean per lower layer −0.5 points, per upper layer −3.0")
    assert (majority.holds, majority.measured) == (
        True, "62.0 % without adapters, +2.0 points from the majority class"
    )  # fmt: skip
    assert section.tables[0].rows[0][3:] == ("−3.0 (layer 1)", "−0.5", "−3.0", "−28.0")
    images = [dataclasses.replace(r, modality="image") for r in of_seeds(results)]
    assert [claim.text for claim in ablation(images).claims] == [single.text, majority.text]


def test_an_interrupted_ablation_is_left_out() -> None:
    whole = [r for r in fake_results.ablation() if r.network == "minilm" and r.facts["norms"] == "kept"]
    complete = ablation(whole)
    for count in range(1, len(whole)):
        # in older results, without the number of layers, the first layer may be the only one
        if count != 2:
            assert ablation(whole[:count]) is None, count
    with_layers = [dataclasses.replace(r, facts={**r.facts, "layers": 6}) for r in whole]
    assert ablation(with_layers[:2]) is None
    assert ablation(with_layers).finding == complete.finding
    # an interrupted seed, or interrupted reverted norms, do not change the rest
    second_seed = [dataclasses.replace(r, seed=1, score=0.1) for r in whole[:9]]
    reverted = [r for r in fake_results.ablation() if r.network == "minilm" and r.facts["norms"] == "reverted"]
    section = ablation([*whole, *second_seed, *reverted[:9]])
    assert (section.finding, section.claims) == (complete.finding, complete.claims)
    assert section.drawings[0].render(Look())


def test_init_scale() -> None:
    scores = {1e-7: 90, 10.0**-2: 89.5, 1.0: 40}
    results = [at("init_scale", "b", score, split="validation", facts={"std": std}) for std, score in scores.items()]
    stopped = at("init_scale", "b", 30, seed=1, split="validation", facts={"std": 1.0, "stopped": "nan"})
    section = init_scale([*results, stopped])
    (claim,) = section.claims
    assert (claim.holds, claim.measured) == (
        None, "range of the means 0.5 points, mean of 1 problem; above it −55.0 points at worst"
    )  # fmt: skip
    assert init_scale(of_seeds(results)).claims[0].holds is True
    assert init_scale(of_seeds([*results[1:], dataclasses.replace(results[0], score=0.5)])).claims[0].holds is False
    assert "1 of 4 training runs ended" in section.finding
    second_seed = [dataclasses.replace(r, seed=2, score=r.score - 0.02) for r in results[:2]]
    (claim,) = init_scale([*results, *second_seed]).claims
    assert claim.measured == (
        "range of the means 0.5 points, mean of 1 problem; standard deviation over seeds ± 1.4; "
        "above it −49.0 points at worst"
    )


@pytest.mark.parametrize("later", ["same", "other"])
def test_sequence_compares_logits_bit_for_bit(later: str) -> None:
    def step(position: int, after: str, problem: str, score: float, outputs: str) -> fake_results.Result:
        facts = {"position": position, "after": after, "total": 1.1 + position / 10, "outputs": outputs}
        return at("sequence", "bottleneck m=8", score, problem=problem, facts=facts)

    results = [
        step(0, "cifar10", "cifar10", 80, "same"),
        step(1, "mnist", "cifar10", 80, later),
        step(1, "mnist", "mnist", 90, "x"),
    ]
    section = sequence(results)
    (claim,) = section.claims
    assert claim.holds == (later == "same")
    assert claim.measured == f"{int(later == 'same')} of 1 later measurements"
    assert "2 tasks on resnet50 with bottleneck m=8 have 1.20 times" in section.finding


def test_sequential_fine_tuning_forgets() -> None:
    section = sequence(list(fake_results.sequence()))
    rows = {row[0]: row[-1] for row in section.tables[0].rows}
    assert rows["bottleneck m=8"] == "0.0"
    assert float(rows["sequential fine-tuning"].replace("−", "-")) < -10
    assert all(claim.holds for claim in section.claims)


def test_transfer() -> None:
    results = [
        at("transfer", "b", score, problem=target, facts={"source": source})
        for target, source, score in (
            ("cifar10", None, 80),
            ("cifar10", "mnist", 82.5),
            ("mnist", None, 95),
            ("mnist", "cifar10", 94),
        )
    ]
    section = transfer(results)
    assert "by −1.0 to +2.5 points; the largest gain is on cifar10 from mnist" in section.finding
    assert "cifar10 from mnist +2.5" in section.drawings[0].alt
    means, scores = section.tables
    assert scores.rows[0] == ("cifar10", "80.0", "–", "82.5")
    assert means.rows == [("cifar10", "+2.5", "–", "−1.0", "–"), ("mnist", "−1.0", "–", "+2.5", "–")]
    (claim,) = section.claims
    assert (claim.holds, claim.training_runs) == (None, 4)
    (claim,) = transfer(of_seeds([r for r in results if r.problem == "cifar10"])).claims
    assert claim.holds is True
    assert claim.measured == (
        "+2.5 points, mean of 1 pair, 95 % interval +2.5 to +2.5; by their own intervals 1 better and 0 worse"
    )


def test_a_pair_of_domains_that_differs_by_one_sample_is_not_better() -> None:
    def ends(samples: int) -> str:
        results = [
            at("transfer", "b", score, problem="mnist", seed=seed, samples=samples, facts={"source": source})
            for source, score in ((None, 80), ("cifar10", 80 + 100 / 30))
            for seed in range(3)
        ]
        return transfer(results).claims[0].measured

    assert ends(30).endswith("by their own intervals 0 better and 0 worse")
    assert ends(3000).endswith("by their own intervals 1 better and 0 worse")


@pytest.mark.parametrize(("kind", "upper", "holds"), [("text", 89.5, True), ("text", 85, False), ("image", 85, True)])
def test_where_in_depth(kind: str, upper: float, holds: bool) -> None:
    places = {("first 2", 2): 80, ("last 2", 2): upper, ("all", 4): 90}
    results = [
        at("modality", f"b, {where}", score, modality=kind, facts={"where": where, "k": k, "layers": 4})
        for (where, k), score in places.items()
    ]
    results += [at("modality", name, 90, modality=kind) for name in ("full fine-tuning", "bottleneck m=8")]
    (claim,) = modality(results).claims
    assert claim.holds is None
    (claim,) = modality(of_seeds(results)).claims
    assert (claim.holds, claim.training_runs) == (holds, 6)
    assert claim.measured == f"last 2 of 4 layers: {signed(upper - 90)} points, first 2: −10.0"


def test_a_claim_on_half_the_layers_needs_half_the_layers() -> None:
    results = [
        at("modality", f"b, {where}", 80, modality="text", facts={"where": where, "k": k, "layers": 6})
        for where, k in (("first 2", 2), ("last 2", 2), ("all", 6))
    ]
    results += [at("modality", name, 90, modality="text") for name in ("full fine-tuning", "bottleneck m=8")]
    assert modality(results).claims == ()


def test_depth_alone_makes_a_section() -> None:
    section = modality([r for r in fake_results.modality() if "where" in r.facts])
    assert [drawing.name for drawing in section.drawings] == ["modality-depth"]
    assert "resnet50: last 8 of 16 layers" in section.finding or "minilm: last 2 of 6 layers" in section.finding


def test_one_table_for_all_networks_by_trained_parameters() -> None:
    networks = {
        "minilm": {"full fine-tuning": (90, 100_000), "bottleneck m=8": (89, 400)},
        "resnet50": {"full fine-tuning": (80, 100_000), "bottleneck m=8": (82, 1_300), "series": (81, 8_000)},
    }
    results = [
        dataclasses.replace(at("modality", name, score, network=network), trained=trained, backbone=100_000)
        for network, methods in networks.items()
        for name, (score, trained) in methods.items()
    ]
    (table,) = modality(results).tables
    assert table.headings == ("method", "minilm", "of backbone", "resnet50", "of backbone")
    assert table.rows == [
        ("bottleneck m=8", "−1.0", "0.40 %", "+2.0", "1.30 %"),
        ("series", "–", "–", "+1.0", "8.00 %"),
        ("full fine-tuning", "0.0", "100.00 %", "0.0", "100.00 %"),
    ]


def test_one_task_makes_a_sequence() -> None:
    section = sequence([r for r in fake_results.sequence() if r.facts["position"] == 0])
    assert all(drawing.render(Look()) for drawing in section.drawings)
    assert section.claims == (), "there is no later measurement"


def learned(contender: str, *order: str, upto: int | None = None, seed: int = 0) -> list[fake_results.Result]:
    """Build the first ``upto`` results of a sequence in the order in which they are computed."""
    results = [
        at("sequence", contender, 80, problem=problem, seed=seed,
           facts={"position": position, "after": after, "total": 1.1 + position / 10, "outputs": problem})
        for position, after in enumerate(order)
        for problem in order[: position + 1]
    ]  # fmt: skip
    return results[:upto]


def test_of_an_interrupted_sequence_the_longest_complete_order_counts() -> None:
    whole = learned("bottleneck m=8", "a", "b", "c")
    finding = "3 tasks on resnet50 with bottleneck m=8 have 1.30 times the backbone's parameters."
    for count in range(6):
        for interrupted in (learned("lora r=4", "a", "b", "c", upto=count), learned(SHARED, "a", "b", "c", upto=count)):
            section = sequence([*whole, *interrupted])
            assert section.finding == finding
            assert [row[0] for row in section.tables[0].rows] == ["bottleneck m=8"]
            assert all(drawing.render(Look()) for drawing in section.drawings)
    section = sequence([*whole, *learned("bottleneck m=8", "a", "b", "c", seed=1, upto=5)])
    assert section.tables == sequence(whole).tables
    section = sequence([*learned("bottleneck m=8", "a", "b", "c", upto=5), *learned(SHARED, "a", "b", "c")])
    assert section.finding.startswith("2 tasks on resnet50 with bottleneck m=8 have 1.20 times")
    assert [row[0] for row in section.tables[0].rows] == ["bottleneck m=8", SHARED]


def test_a_sequence_needs_a_contender_and_its_first_problem() -> None:
    assert sequence(learned(SHARED, "a", "b")) is None
    assert sequence(learned("lora r=4", "a", "b")[1:]) is None


def test_orders_are_reported_separately() -> None:
    orders = (("a", "b", "c", "d"), ("b", "d", "a"), ("a", "c"))
    results = [r for order in orders for name in ("lora r=4", SHARED) for r in learned(name, *order)]
    # two of them share the result of the first position
    section = sequence(list({str(r): r for r in results}.values()))
    assert section.finding == (
        "4 tasks on resnet50 with lora r=4 have 1.40 times the backbone's parameters; "
        "3 tasks on resnet50 (b, d, a) with lora r=4 have 1.30 times the backbone's parameters; "
        "2 tasks on resnet50 (a, c) with lora r=4 have 1.20 times the backbone's parameters."
    )
    assert len({drawing.name for drawing in section.drawings}) == 6
    assert all(drawing.render(Look()) for drawing in section.drawings)
    assert [claim.measured for claim in section.claims] == [
        "6 of 6 later measurements", "3 of 3 later measurements", "1 of 1 later measurements"
    ]  # fmt: skip


def test_decathlon() -> None:
    section = decathlon(list(fake_results.decathlon()))
    assert section.finding.startswith("parallel scores highest, 791 of 3,000, over cifar10, fashion-mnist and mnist")
    assert [row[-2] for row in section.tables[0].rows] == ["761", "791", "751"]


def test_a_comparison_on_several_domains_has_a_score() -> None:
    scores = {"full fine-tuning": (80, 90, 100), "bottleneck m=8": (90, 90, 50), "series": (99, 99, 99)}
    results = [
        at("compare", name, score, problem=problem, split=split, seed=seed)
        for name, each in scores.items()
        for problem, score in zip("abc", each, strict=True)
        for split in ("test", "validation")
        for seed in range(2)
        if name != "series" or problem != "b"
    ]
    section = decathlon(results)
    # by hand: without errors of the baseline there is no scale; 1000 · (1 − 10 / 40)² + 250
    (table,) = section.tables
    assert table.headings == ("method", "a", "b", "score", "parameters / backbone")
    assert [row[:4] for row in table.rows] == [
        ("full fine-tuning", "80.0 ± 0.0", "90.0 ± 0.0", "500"),
        ("bottleneck m=8", "90.0 ± 0.0", "90.0 ± 0.0", "812"),
    ]
    (claim,) = section.claims
    assert (claim.holds, claim.training_runs) == (True, 8)
    assert claim.measured == (
        "bottleneck m=8: 812, full fine-tuning: 500, over 2 domains; difference, 95 % interval +312 to +312"
    )
    assert decathlon([r for r in results if r.problem != "c"]) is None, "two domains"


def test_one_dataclass_on_every_backbone() -> None:
    scores = {"full fine-tuning": 80, "linear probe": 70, "bottleneck m=8": 81, "colora": 79}
    results = [
        at(
            "crossmodal", name, score + seed, network=network, seed=seed, fraction=0.0131,
            facts={"weights": weights, **({"m": 8} if "m=8" in name else {})},
        )
        for network, weights in (("resnet50", "pretrained"), ("minilm", "random"))
        for name, score in scores.items()
        for seed in range(2)
        if name != "colora" or network == "minilm"
    ]  # fmt: skip
    section = crossmodal(results)
    assert section.finding == "The same Bottleneck(m) adapts 2 backbones with 1.3 % of their parameters."
    assert "The weights of minilm are random" in section.reading
    same, others = section.tables
    probe, own, full = "70.5 ± 0.7", "81.5 ± 0.7", "80.5 ± 0.7"
    figures = ("cifar10", "bottleneck m=8", "1.31 %", "1.31 MB", probe, own, full, "+1.0", "+1.0 to +1.0")
    assert same.rows[0] == ("resnet50", "pretrained", *figures)
    assert [row[0] for row in same.rows] == ["resnet50", "minilm"]
    assert [row[:4] for row in others.rows] == [("minilm", "random", "cifar10", "colora")]
    # of an interrupted run
    (table,) = crossmodal([r for r in results if r.contender == "bottleneck m=8"]).tables
    assert table.rows[0][6:] == ("–", own, "–", "–", "–")
    assert crossmodal([r for r in results if r.contender != "bottleneck m=8"]) is None


def test_more_seeds_replace_every_score() -> None:
    def scores(seeds: int, score: float) -> list[fake_results.Result]:
        facts = {"problems": ["cifar10"], "seeds": seeds, "total": 1.2}
        return [
            at("decathlon", "series", 100 * score, problem="all", metric="decathlon", seed=seed, facts=facts)
            for seed in range(seeds)
        ]

    (section,) = build([*scores(1, 100), *scores(2, 300)]).sections
    assert section.finding == "series scores highest, 300 of 1,000, over cifar10 (resnet50)."
    assert "series 300" in section.drawings[0].alt


def test_scores_over_other_problems_and_networks_are_separate() -> None:
    def total(score: float, *problems: str, **more: str) -> fake_results.Result:
        facts = {"problems": list(problems), "seeds": 1, "total": 1.2}
        return at("decathlon", "series", 100 * score, problem="all", metric="decathlon", facts=facts, **more)

    results = [total(400, "a", "b"), total(700, "a", "b", "c"), total(300, "a", "b", network="minilm")]
    section = decathlon(results)
    assert section.finding == (
        "series scores highest, 400 of 2,000, over a and b (resnet50); "
        "series scores highest, 700 of 3,000, over a, b and c (resnet50); "
        "series scores highest, 300 of 2,000, over a and b (minilm)."
    )
    assert len({drawing.name for drawing in section.drawings}) == len(section.tables) == 3


def test_sections_without_results_are_left_out() -> None:
    report = build(list(fake_results.transfer()))
    assert [section.name for section in report.sections] == ["transfer"]
    assert report.made_with == ("36 results: commit abc1234, device cpu x86_64, python 3.11, torch 2.14.1",)
    with pytest.raises(VisadaptError, match="0 results are too few for a report"):
        build([])


def test_numbers_as_text() -> None:
    assert [signed(x) for x in (0.44, -1.25, -0.04, 0.0)] == ["+0.4", "−1.2", "0.0", "0.0"]
    assert [two_digits(x) for x in (0.2259, 5.35, 99.7, 100)] == ["0.23", "5.3", "100", "100"]
    assert [join_words(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert mean_and_std([]) == "–"
    assert mean_and_std([at("compare", "series", score) for score in (-0.2, -0.4)]) == "−0.3 ± 0.1"
    assert file_name("ablation", "resnet50", "bottleneck m=8") == "ablation-resnet50-bottleneck-m-8"
    assert [is_adapter(name) for name in ("bottleneck m=8", "top layers n=2", "norms only")] == [True, False, False]
