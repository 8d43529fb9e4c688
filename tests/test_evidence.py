"""The evidence: what it asks for, how it tunes, and that it goes on from what is published."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import evidence
from benchmarks.evidence import STAGES, Data, Lab
from tests.report import fake_results
from visadapt import inject, tasks
from visadapt.data.hub import resolve
from visadapt.experiments import Compare, contender, write_csv
from visadapt.experiments.run import TrainingRun


def score(run: TrainingRun) -> float:
    """Best at the highest rate, but on films, and there by more."""
    return 0.5 + run.contender.recipe.lr * (-2 if run.problem.name == "movies" else 1)


@pytest.fixture
def asked(monkeypatch):
    """Every experiment that is asked for; a comparison has made-up results."""
    experiments = []

    def run(experiment, folder, **options):
        experiments.append(experiment)
        if not isinstance(experiment, Compare):
            return []
        return [
            dataclasses.replace(
                fake_results.result("compare", "resnet50", "cifar10", run.contender.name, run.seed, 0),
                lr=run.contender.recipe.lr,
                score=score(run),
            )
            for run in experiment.runs(lambda key: None)
        ]

    monkeypatch.setattr(evidence, "run_experiment", run)
    return experiments


def test_each_takes_the_rate_that_is_best_in_the_mean_over_the_problems_to_sweep_on(asked, tmp_path):
    lab, names = Lab(tmp_path, 1, "cpu"), ("linear probe", "bottleneck m=8")
    images, texts = Data().images(), Data(tmp_path).texts()
    found = [(who.name, who.recipe.lr, who.rates) for at in (images, texts) for who in lab.tuned(names, at)]
    assert found == [
        ("linear probe", 0.1, ()),
        ("bottleneck m=8", 1e-2, ()),
        ("linear probe", 1e-3, ()),
        ("bottleneck m=8", 1e-3, ()),
    ]
    assert [[at.name for at in sweep.problems] for sweep in asked] == [["cifar10"], ["sst2", "movies"]]
    for sweep in asked:
        assert (sweep.split, sweep.seeds, sweep.keep) == ("validation", (0,), names)
        assert all(len(one.rates) > 2 for one in sweep.contenders)


def test_what_is_tuned_is_not_swept_again(asked, tmp_path):
    evidence.compare(Data(tmp_path), Lab(tmp_path, 1, "cpu"))
    sweeps = {at.name for one in asked for at in one.problems for who in one.contenders if who.rates}
    assert sweeps == {"sst2", "movies", "cifar10"}
    compared = {at.name for one in asked for at in one.problems if one.split == "test"}
    assert compared == {at.name for at in (*Data(tmp_path).texts(), *Data(tmp_path).images())}


@pytest.mark.filterwarnings("ignore:.*choose a smaller m")  # VGG's first convolutions are small
@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("bundled/minilm", (*evidence.TEXT, *evidence.MORE_TEXT)),
        ("bundled/resnet50", (*evidence.IMAGE, *evidence.MORE_IMAGE)),
        ("timm/vgg16", evidence.VGG),
    ],
)
def test_every_contender_finds_its_sites(network, names):
    model = resolve(network, pretrained=False) if network == "timm/vgg16" else resolve(network)
    for number, name in enumerate(names):
        who = contender(name)
        inject(model, who.method, task=f"task{number}", num_classes=2, norms=who.norms)
    assert len(tasks(model)) == len(names)


def test_only_bundled_data_where_nothing_else_is_given(asked, tmp_path):
    for stage in STAGES:
        stage(Data(), Lab(tmp_path, 1, "cpu"))
    problems = {problem for experiment in asked for problem in experiment.problems}
    assert {p.network for p in problems} == {"bundled/resnet50", "bundled/minilm"}
    assert {p.name for p in problems} == {
        "cifar10", "fashion-mnist", "mnist", "tweets", "products", "movies", "editorials",
    }  # fmt: skip
    assert {type(experiment).name for experiment in asked} == {
        "compare", "init_scale", "ablation", "tradeoff", "sequence", "modality", "transfer",
    }  # fmt: skip


def test_what_has_one_name_in_one_experiment_is_of_one_setting(asked, tmp_path):
    for stage in STAGES:
        stage(Data(), Lab(tmp_path, 1, "cpu"))
    settings = {}
    for experiment in asked:
        for run in experiment.runs(lambda key: None):
            if isinstance(run, TrainingRun):
                name = experiment.name, run.problem.backbone, run.problem.name, run.contender.name, str(run.facts)
                settings.setdefault(name, set()).add(run.setting)
    assert len(settings) > 100
    assert [name for name, found in settings.items() if len(found) > 1] == []


def test_what_is_given_is_used_too(asked, tmp_path):
    (tmp_path / "signs.zip").touch()
    data = Data(tmp_path / "glue", tmp_path / "signs.zip", tmp_path / "vgg.safetensors")
    for stage in STAGES:
        stage(data, Lab(tmp_path, 1, "cpu"))
    names = {problem.name for experiment in asked for problem in experiment.problems}
    assert {"sst2", "cola", "trec", "mrpc", "rte", "signs", "tweets", "mnist"} <= names
    assert any(problem.backbone == "vgg16" for experiment in asked for problem in experiment.problems)


def test_what_was_published_is_known_and_what_is_made_is_published(asked, tmp_path, monkeypatch):
    published = tmp_path / "evidence.csv"
    write_csv(fake_results.all_results(), published)
    seen = []

    def stage(data, lab):
        seen.extend(path.name for path in lab.folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "STAGES", (stage,))
    monkeypatch.setattr("sys.argv", ["evidence", str(tmp_path / "results"), "--out", str(published)])
    before = published.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        evidence.main()
    assert seen == ["published.csv"]
    assert published.read_bytes() == before


def test_an_unknown_stage_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evidence", str(tmp_path / "results"), "--only", "compair"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "no stage 'compair'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
