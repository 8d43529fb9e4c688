"""The evidence: its experiments, that it resumes from what is published, and that regimes stay apart."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from benchmarks import evidence, regimes
from benchmarks.evidence import BARS, MORE, OTHERS, RANDOM, STAGES, WIDTHS
from benchmarks.regimes import REGIMES, Data, Lab
from tests.report import fake_results
from visadapt import inject, summary, tasks
from visadapt.data.hub import resolve
from visadapt.experiments import Compare, contender, read_results, write_csv
from visadapt.experiments.networks import short_name, vgg16
from visadapt.experiments.run import TrainingRun


@pytest.fixture
def requested(monkeypatch):
    """Collect the requested experiments, with the options that they are run with."""
    experiments = []

    def run(experiment, folder, **options):
        experiments.append((experiment, options))
        return []

    monkeypatch.setattr(regimes, "run_experiment", run)
    return experiments


def lab(folder, regime="cpu", **changes) -> Lab:
    return Lab(**{"folder": folder, "processes": 1, "device": "cpu", "regime": REGIMES[regime], **changes})


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
        inject(model, each.method, task=f"task{number}", num_classes=2, norms=each.norms)
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


def test_by_default_only_bundled_data_is_used(requested, tmp_path):
    for stage in STAGES:
        stage(Data(), lab(tmp_path))
    problems = {problem for experiment, _ in requested for problem in experiment.problems}
    assert {p.network for p in problems} == {"bundled/resnet50", "bundled/minilm", *RANDOM}
    assert {p.name for p in problems} == {
        "cifar10", "fashion-mnist", "mnist", "tweets", "products", "movies", "editorials",
    }  # fmt: skip
    assert {type(experiment).name for experiment, _ in requested} == {
        "compare", "crossmodal", "init_scale", "ablation", "tradeoff", "sequence", "modality", "transfer",
    }  # fmt: skip


def test_other_data_is_used_if_given(requested, tmp_path):
    for stage in STAGES:
        stage(all_data(tmp_path), lab(tmp_path))
    problems = {problem for experiment, _ in requested for problem in experiment.problems}
    assert {"sst2", "cola", "trec", "mrpc", "rte", "signs", "characters", "cells"} <= {p.name for p in problems}
    assert any(problem.backbone == "vgg16" for problem in problems)
    images = {p.name: p.augment for p in problems if p.modality == "image"}
    mirrored = {name for name, augment in images.items() if augment == "shift and mirror"}
    assert mirrored == {"cifar10", "fashion-mnist", "cells"}
    assert None not in images.values()
    assert next(p for p in problems if p.name == "cola").train is None


def test_full_fine_tuning_is_really_trained():
    for regime in REGIMES.values():
        assert regime.texts >= 2000
        assert min(regime.image_epochs) >= 5
        assert 64 <= regime.side <= 96
        for problem in (Data().images(regime)[0], Data().texts(regime)[0]):
            full = regime.contender("full fine-tuning", problem)
            assert full.recipe.fast
            assert full.recipe.head_first
            assert full.validated
            assert full.extend
            assert regime.settled("full fine-tuning", problem).recipe.epochs in full.lengths


def test_a_partial_run_is_balanced_over_problems(requested, tmp_path):
    evidence.bars(all_data(tmp_path), lab(tmp_path))
    order = [(experiment.problems[0].name, len(experiment.seeds)) for experiment, _ in requested]
    names = [name for name, count in order if count == 1]
    assert len(names) == 9 + 6
    assert order == [(name, count) for count in range(1, 6) for name in names]
    assert {experiment.split for experiment, _ in requested} == {"both"}


def test_several_processes_share_the_problems_of_a_modality(requested, tmp_path):
    evidence.bars(Data(), lab(tmp_path, "cuda", processes=4))
    assert [len(experiment.problems) for experiment, _ in requested] == [3, 4] * 3


def test_the_names_in_one_experiment_have_one_setting(requested, tmp_path):
    for stage in STAGES:
        stage(Data(), lab(tmp_path))
    settings = {}
    for experiment, _ in requested:
        for run in experiment.runs(lambda key: None):
            if isinstance(run, TrainingRun):
                facts = {name: fact for name, fact in run.facts.items() if name != "variant"}
                name = experiment.name, run.problem.backbone, run.problem.name, run.contender.name, str(facts)
                settings.setdefault(name, set()).add(run.setting)
    assert len(settings) > 100
    assert [name for name, hashes in settings.items() if len(hashes) > 1] == []


def test_files_of_full_fine_tuning_are_not_kept(requested, tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "LARGE", 100)
    (tmp_path / "tasks").mkdir()
    for name, size in (("small", 100), ("large", 101)):
        (tmp_path / "tasks" / f"{name}.visadapt").write_bytes(bytes(size))
    problem = Data().texts(REGIMES["cpu"])[0]
    lab(tmp_path).run(Compare((problem,), (contender("lora"),), (0,)))
    assert [file.name for file in (tmp_path / "tasks").iterdir()] == ["small.visadapt"]


def run_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["evidence", *map(str, arguments)])
    evidence.main()


def test_published_results_are_reused_and_only_those_of_the_regime_are_published(tmp_path, monkeypatch):
    published = tmp_path / "evidence.csv"
    of_cpu = [dataclasses.replace(result, regime="cpu") for result in fake_results.compare()]
    write_csv(of_cpu, published)
    files = []

    def stage(data, lab):
        files.extend(path.name for path in lab.folder.iterdir())
        write_csv(fake_results.transfer(), lab.folder / "other.csv")
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "STAGES", (stage,))
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, tmp_path / "results", "--out", published)
    assert files == ["published.csv"]
    assert {result.regime for result in read_results(published)} == {"cpu"}
    assert len(read_results(published)) == len(of_cpu)


def test_the_device_chooses_the_regime_and_the_budget_ends_it(requested, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "STAGES", (evidence.bars,))
    options = ("--device", "cuda:0", "--budget", 480, "--processes", 4, "--out", tmp_path / "out.csv")
    run_main(monkeypatch, tmp_path / "results", *options)
    for _, options in requested:
        assert (options["regime"], options["device"], options["processes"]) == ("cuda", "cuda:0", 4)
        assert 470 < options["deadline"] - time.time() <= 480
    assert read_results(tmp_path / "out.csv") == []


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
