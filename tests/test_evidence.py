"""The evidence: its experiments, how it tunes contenders, and that it resumes from the published results."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import evidence
from benchmarks.evidence import STAGES, Data, Lab
from tests.report import fake_results
from visadapt import inject, tasks
from visadapt.data.hub import resolve
from visadapt.experiments import Compare, contender, read_results, write_csv
from visadapt.experiments.run import TrainingRun


def score(run: TrainingRun) -> float:
    """Return a score that is best at the highest rate, except on films, where the lowest is best by more."""
    return 0.5 + run.contender.recipe.lr * (-2 if run.problem.name == "movies" else 1)


@pytest.fixture
def requested(monkeypatch):
    """Collect the requested experiments; a comparison returns invented results."""
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


def test_contenders_get_the_rate_that_is_best_on_average_over_the_swept_problems(requested, tmp_path):
    lab, names = Lab(tmp_path, 1, "cpu"), ("linear probe", "bottleneck m=8")
    images, texts = Data().images(), Data(tmp_path).texts()
    tuned = [(who.name, who.recipe.lr, who.rates) for problems in (images, texts) for who in lab.tuned(names, problems)]
    assert tuned == [
        ("linear probe", 0.1, ()),
        ("bottleneck m=8", 1e-2, ()),
        ("linear probe", 1e-3, ()),
        ("bottleneck m=8", 1e-3, ()),
    ]
    assert [[problem.name for problem in sweep.problems] for sweep in requested] == [["cifar10"], ["sst2", "movies"]]
    for sweep in requested:
        assert (sweep.split, sweep.seeds, sweep.keep) == ("validation", (0,), names)
        assert all(len(one.rates) > 2 for one in sweep.contenders)


def test_tuned_contenders_are_not_swept_again(requested, tmp_path):
    evidence.compare(Data(tmp_path), Lab(tmp_path, 1, "cpu"))
    swept = {problem.name for each in requested for problem in each.problems for who in each.contenders if who.rates}
    assert swept == {"sst2", "movies", "cifar10"}
    compared = {problem.name for each in requested for problem in each.problems if each.split == "test"}
    assert compared == {problem.name for problem in (*Data(tmp_path).texts(), *Data(tmp_path).images())}


@pytest.mark.filterwarnings("ignore:.*choose a smaller m")  # VGG's first convolutions are small
@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("bundled/minilm", (*evidence.TEXT, *evidence.MORE_TEXT)),
        ("bundled/resnet50", (*evidence.IMAGE, *evidence.MORE_IMAGE)),
        ("timm/vgg16", evidence.VGG),
    ],
)
def test_every_contender_can_be_injected(network, names):
    model = resolve(network, pretrained=False) if network == "timm/vgg16" else resolve(network)
    for number, name in enumerate(names):
        each = contender(name)
        inject(model, each.method, task=f"task{number}", num_classes=2, norms=each.norms)
    assert len(tasks(model)) == len(names)


def test_by_default_only_bundled_data_is_used(requested, tmp_path):
    for stage in STAGES:
        stage(Data(), Lab(tmp_path, 1, "cpu"))
    problems = {problem for experiment in requested for problem in experiment.problems}
    assert {p.network for p in problems} == {"bundled/resnet50", "bundled/minilm"}
    assert {p.name for p in problems} == {
        "cifar10", "fashion-mnist", "mnist", "tweets", "products", "movies", "editorials",
    }  # fmt: skip
    assert {type(experiment).name for experiment in requested} == {
        "compare", "init_scale", "ablation", "tradeoff", "sequence", "modality", "transfer",
    }  # fmt: skip


def test_the_names_in_one_experiment_have_one_setting(requested, tmp_path):
    for stage in STAGES:
        stage(Data(), Lab(tmp_path, 1, "cpu"))
    settings = {}
    for experiment in requested:
        for run in experiment.runs(lambda key: None):
            if isinstance(run, TrainingRun):
                name = experiment.name, run.problem.backbone, run.problem.name, run.contender.name, str(run.facts)
                settings.setdefault(name, set()).add(run.setting)
    assert len(settings) > 100
    assert [name for name, hashes in settings.items() if len(hashes) > 1] == []


def test_other_data_is_used_if_given(requested, tmp_path):
    (tmp_path / "signs.zip").touch()
    data = Data(tmp_path / "glue", tmp_path / "signs.zip", tmp_path / "vgg.safetensors")
    for stage in STAGES:
        stage(data, Lab(tmp_path, 1, "cpu"))
    names = {problem.name for experiment in requested for problem in experiment.problems}
    assert {"sst2", "cola", "trec", "mrpc", "rte", "signs", "tweets", "mnist"} <= names
    assert any(problem.backbone == "vgg16" for experiment in requested for problem in experiment.problems)


def test_published_results_are_found_by_their_keys(requested, tmp_path):
    known = {(result.experiment, result.key) for result in read_results(evidence.PUBLISHED)}
    for stage in (evidence.init_scale, evidence.tradeoff, evidence.ablation):
        stage(Data(), Lab(tmp_path, 1, "cpu"))
    # on texts the published runs use data that is not bundled
    runs = {
        key: (experiment.name, key)
        for experiment in requested
        if experiment.problems[0].modality == "image"
        for run in experiment.runs(lambda key: None)
        for key in run.keys
    }
    keys = [key for key in runs.values() if key in known]
    assert {experiment for experiment, _ in keys} == {"init_scale", "tradeoff", "ablation"}
    assert len(keys) > 0.9 * len(runs)


def test_published_results_are_reused_and_new_ones_are_published(requested, tmp_path, monkeypatch):
    published = tmp_path / "evidence.csv"
    write_csv(fake_results.all_results(), published)
    files = []

    def stage(data, lab):
        files.extend(path.name for path in lab.folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "STAGES", (stage,))
    monkeypatch.setattr("sys.argv", ["evidence", str(tmp_path / "results"), "--out", str(published)])
    before = published.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        evidence.main()
    assert files == ["published.csv"]
    assert published.read_bytes() == before


def test_an_unknown_stage_is_an_error_with_the_nearest_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evidence", str(tmp_path / "results"), "--only", "compair"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "no stage 'compair'; did you mean 'compare'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
