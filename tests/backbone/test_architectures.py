"""inject(model, m=32) with nothing said about where, over the architectures of timm, torchvision and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import visadapt
from tests.backbone.architectures import ALL, TIMM, check
from visadapt.backbone import traced
from visadapt.backbone.find import covers, structural
from visadapt.backbone.heads import find_head
from visadapt.backbone.modules import own_modules
from visadapt.backbone.site import Site

# one of each kind of block: sums of maps, of sequences, channels last, windows, concatenations, no shortcut at all,
# shared weights, several heads, a head that is a container
FAST = (
    "resnet10t",
    "regnetx_002",
    "mobilenetv3_small_050",
    "convnext_zepto_rms",
    "ese_vovnet19b_slim_dw",
    "dpn48b",
    "efficientvim_m1",
    "mixer_s32_224",
    "nf_regnet_b0",
    "repvit_m1",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "Albert",
    "GPT2",
    "T5",
    "Swin",
    "ResNet",
)
BY_NAME = {a.name: a for a in reversed(ALL)}


def failures_of(report) -> list[str]:
    wrong = [name for name in ("identity", "head", "gradient", "frozen", "file") if not getattr(report, name)]
    return [report.error] if report.error else wrong


@pytest.mark.parametrize("name", FAST)
def test_inject_knows_where(name: str, tmp_path: Path) -> None:
    assert failures_of(check(BY_NAME[name], tmp_path)) == []


# the same checks over everything; the generator of docs/architectures.md runs them two at a time
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_at_least_95_percent_of_timm_s_families_need_no_word(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "docs" / "build" / "architectures.py"
    results = tmp_path / "results.jsonl"
    subprocess.run(
        [sys.executable, script, "--results", results, "--table", tmp_path / "table.md"],
        check=True,
        capture_output=True,
    )
    reports = [json.loads(line) for line in results.read_text().splitlines()]
    wrong = {
        f"{r['library']}/{r['name']}": r["error"]
        for r in reports
        if r["error"] or not all(r[key] for key in ("identity", "head", "gradient", "frozen", "file"))
    }
    assert len(reports) == len(ALL)
    timm_wrong = [name for name in wrong if name.startswith("timm/")]
    assert len(timm_wrong) <= 0.05 * len(TIMM), wrong
    assert not set(wrong) - set(timm_wrong), wrong
    for name in timm_wrong:
        assert "example=" in wrong[name] or "where=" in wrong[name]


def test_every_family_of_timm_has_one() -> None:
    import timm

    assert {a.family for a in TIMM} >= set(timm.list_modules())


STRUCTURAL = (
    *("resnet10t", "legacy_seresnet18", "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "convnext_zepto_rms"),
    *("mobilenetv3_small_050", "mnasnet_small", "swin_tiny_patch4_window7_224", "mobilenet_v2", "vit_b_32"),
    *("convnext_tiny", "DistilBert"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "efficientnet_v2_s")),
)


def places(sites: list[Site]) -> dict[str, tuple]:
    # DistilBERT's attention ends with its last linear: either is its end
    return {
        s.full_name.removesuffix(".dropout").removesuffix(".out_lin"): (s.channels, s.layout, s.linear) for s in sites
    }


@pytest.mark.parametrize("name", STRUCTURAL)
def test_what_a_family_knows_is_what_the_dataflow_shows(name: str) -> None:
    model = BY_NAME[name].blank()
    modules = own_modules(model)
    known = structural(model, modules)
    assert covers(known, modules, find_head(model))
    seen = places(traced.find(model, modules, find_head(model))[0])
    told = places(known)
    # a first block of a single conv ends in another place than its siblings, which the dataflow alone does not tell
    extra = {"mobilenet_v2": {"block:features.1.conv.2"}}.get(name, set())
    assert set(told) - set(seen) == extra
    assert {place: told[place] for place in seen} == seen


@pytest.mark.parametrize("name", ["mobilevit_xxs", "volo_d1_224"])
def test_a_hybrid_is_not_taken_for_the_family_of_one_half(name: str) -> None:
    model = BY_NAME[name].blank()
    modules = own_modules(model)
    known = structural(model, modules)
    assert known == [] or not covers(known, modules, find_head(model))
    kinds = set(visadapt.sites(model).kinds())
    assert {"attention", "mlp"} <= kinds


def test_a_known_family_is_placed_at_once(monkeypatch) -> None:
    monkeypatch.setattr(traced, "find", None)
    for name in STRUCTURAL[:-2]:
        assert len(visadapt.sites(BY_NAME[name].blank())) > 3
