"""Calls of the public API with arguments that cannot be meant, made from its signatures: each is one clear error."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, same, snapshot
from visadapt import VisadaptError, data, experiments, report, serving, training
from visadapt.experiments import Result
from visadapt.export.program import export
from visadapt.frozen.cached_prefix import CachedPrefix
from visadapt.printable import shown
from visadapt.serving import Limits, Server
from visadapt.training.target import target_of


class Context:
    """A model with two tasks, files, and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = ZOO["tiny/resnet"].make()
        for task in ("a", "b"):
            visadapt.inject(self.model, m=2, task=task, num_classes=3, labels=("x", "y", "z"), where="layer4")
        self.bare = ZOO["tiny/resnet"].make()
        self.x = torch.randn(4, 3, 32, 32)
        self.labels = torch.tensor([0, 1, 2, 0])
        visadapt.fit_decider(self.model, {"a": [self.x], "b": [self.x + 1]}, steps=2)
        self.task = visadapt.save(self.model, "a", folder / "a.visadapt")
        self.decider = visadapt.save_decider(self.model, folder / "decider")
        words = ("k0", "compare", "image", "net", "data", "who")
        self.result = Result(*words, 0, "test", "accuracy", 0.5, 1, 1, 9, 1.0, 9, 0.1, 1)
        self.results = experiments.write_csv([self.result], folder / "results.csv")
        self.problem = experiments.ImageProblem("bundled/resnet50", "cifar10", train=20)
        self.contender = experiments.contender("bottleneck m=8")
        self.experiment = experiments.Compare((self.problem,), (self.contender,))
        self.images = data.ImageSplit(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1] * 3))
        self.texts = data.TextSplit(["one", "two"], torch.tensor([0, 1]))
        self.files = data.ImageFiles(self.images.images, self.images.labels)
        inner = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="a", where="layer4", norms="frozen", num_classes=3)
        self.cached = visadapt.cache_prefix(inner, "a", self.x)
        self.server = Server(self.model)
        self.set = data.ImageSet("set", ("a", "b"), self.images, self.images)

    def parts(self, split: Any) -> dict[str, Any]:
        return {"name": "x", "classes": ("a", "b"), "train": split, "test": split}

    def problems(self) -> dict[str, Any]:
        return {"problems": (self.problem,)}

    def state(self) -> Any:
        there = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        files = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in there]
        active = visadapt.active(self.model)
        return repr(visadapt.tasks(self.model)), active, files, torch.get_rng_state().tolist()


def awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a coroutine function to its end."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        return asyncio.run(function(**arguments))

    return run


_METHODS = [cls for cls in visadapt.METHODS.values() if inspect.signature(cls).parameters]

CALLS: dict[str, tuple[Callable[..., Any], Callable[[Context], dict[str, Any]]]] = {
    **{cls.__name__: (cls, lambda c: {}) for cls in _METHODS},
    "activate": (visadapt.activate, lambda c: {"model": c.model, "task": "a"}),
    "active": (visadapt.active, lambda c: {"model": c.model}),
    "cache_prefix": (visadapt.cache_prefix, lambda c: {"model": c.model, "task": "a", "inputs": c.x}),
    "combine": (
        visadapt.combine,
        lambda c: {"model": c.model, "weights": {"a": 0.5, "b": 0.5}, "into": "c"},
    ),
    "decide": (visadapt.decide, lambda c: {"model": c.model, "inputs": c.x}),
    "eject": (visadapt.eject, lambda c: {"model": c.model}),
    "fit_decider": (visadapt.fit_decider, lambda c: {"model": c.model, "samples": {"a": [c.x], "b": [c.x]}}),
    "fold": (visadapt.fold, lambda c: {"model": c.model}),
    "inject": (visadapt.inject, lambda c: {"model": c.model, "task": "c"}),
    "lean": (visadapt.lean, lambda c: {"model": c.model}),
    "load": (visadapt.load, lambda c: {"model": c.model, "path": c.task, "task": "c"}),
    "load_decider": (visadapt.load_decider, lambda c: {"model": c.model, "path": c.decider}),
    "merge": (visadapt.merge, lambda c: {"model": c.model, "task": "a"}),
    "merge_error": (visadapt.merge_error, lambda c: {"model": c.model, "merged": c.model, "task": "a"}),
    "named_parameters": (lambda **k: list(visadapt.named_parameters(**k)), lambda c: {"model": c.model, "task": "a"}),
    "open": (visadapt.open, lambda c: {"source": c.task, "backbone": c.bare}),
    "parameters": (visadapt.parameters, lambda c: {"model": c.model, "task": "a"}),
    "predict": (visadapt.predict, lambda c: {"model": c.model, "inputs": c.x, "task": "a"}),
    "preprocess": (visadapt.preprocess, lambda c: {"model": c.model, "task": "a"}),
    "push_to_hub": (visadapt.push_to_hub, lambda c: {"model": c.model, "task": "a", "repository": "me/it"}),
    "remove": (visadapt.remove, lambda c: {"model": c.model, "task": "a"}),
    "save": (visadapt.save, lambda c: {"model": c.model, "task": "a", "path": c.folder / "new"}),
    "save_decider": (visadapt.save_decider, lambda c: {"model": c.model, "path": c.folder / "new"}),
    "set_alpha": (visadapt.set_alpha, lambda c: {"model": c.model, "task": "a", "alpha": 0.5}),
    "sites": (visadapt.sites, lambda c: {"model": c.model}),
    "split": (visadapt.split, lambda c: {"model": c.model, "logits": torch.zeros(1, 3), "tasks": ["a"]}),
    "summary": (visadapt.summary, lambda c: {"model": c.model}),
    "tasks": (visadapt.tasks, lambda c: {"model": c.model}),
    "trainable": (visadapt.trainable, lambda c: {"model": c.model, "task": "a"}),
    "unlean": (visadapt.unlean, lambda c: {"model": c.model}),
    "unmerge": (visadapt.unmerge, lambda c: {"model": c.model}),
    "using": (lambda **k: visadapt.using(**k).__enter__(), lambda c: {"model": c.model, "task": "a"}),
    "export.program": (
        export,
        lambda c: {"model": c.model, "path": c.folder / "new.pt2", "task": "a", "example": c.x},
    ),
    "serving.Server": (Server, lambda c: {"source": c.model}),
    "serving.Limits": (Limits, lambda c: {}),
    "training.evaluate": (training.evaluate, lambda c: {"model": c.model, "task": "a", "data": (c.x, c.labels)}),
    "training.predict": (training.predict, lambda c: {"model": c.model, "task": "a", "data": c.x}),
    "training.fit": (training.fit, lambda c: {"model": c.model, "task": "a", "train": (c.x, c.labels)}),
    "training.Recipe": (training.Recipe, lambda c: {}),
    "training.JsonLines": (training.JsonLines, lambda c: {"path": c.folder / "log"}),
    "training.Samples": (training.Samples, lambda c: {"inputs": c.x}),
    "training.tokenised": (training.tokenised, lambda c: {"tokenizer": object(), "split": c.texts}),
    "training.trimmed": (training.trimmed, lambda c: {"inputs": {"attention_mask": torch.ones(2, 2)}}),
    "data.path": (data.path, lambda c: {"name": "mnist.json"}),
    "data.ImageSplit": (data.ImageSplit, lambda c: {"images": c.images.images, "labels": c.images.labels}),
    "data.ImageSet": (data.ImageSet, lambda c: c.parts(c.images)),
    "data.TextSplit": (data.TextSplit, lambda c: {"texts": ["a"], "labels": torch.tensor([0])}),
    "data.TextSet": (
        data.TextSet,
        lambda c: {**c.parts(c.texts), "validation": c.texts},
    ),
    "data.image_files": (data.image_files, lambda c: {"place": c.folder}),
    "data.load_images": (data.load_images, lambda c: {"data": "mnist"}),
    "data.load_squares": (data.load_squares, lambda c: {"name_or_path": "mnist", "size": 8}),
    "data.read_images": (data.read_images, lambda c: {"files": [], "size": 8}),
    "data.renumbered": (data.renumbered, lambda c: {"data": c.set, "labels": ["b", "a"]}),
    "data.load_text": (data.load_text, lambda c: {"name_or_path": "tweets"}),
    "data.read_texts": (data.read_texts, lambda c: {"file": c.folder / "none.csv"}),
    "data.augment": (data.augment, lambda c: {"images": c.x, "generator": torch.Generator()}),
    "data.normalize": (data.normalize, lambda c: {"images": c.images.images}),
    "data.dequantise": (data.dequantise, lambda c: {"file": c.folder / "none"}),
    "data.tokenizer_of": (data.tokenizer_of, lambda c: {"backbone": "bundled/minilm"}),
    "experiments.contender": (experiments.contender, lambda c: {"name": "bottleneck m=8"}),
    "experiments.Contender": (
        experiments.Contender,
        lambda c: {"name": "x", "method": visadapt.Full(), "recipe": training.Recipe()},
    ),
    "experiments.problem": (experiments.problem, lambda c: {"network": "bundled/resnet50", "data": "cifar10"}),
    "experiments.ImageProblem": (experiments.ImageProblem, lambda c: {"network": "bundled/resnet50", "data": "x"}),
    "experiments.TextProblem": (experiments.TextProblem, lambda c: {"network": "bundled/minilm", "data": "tweets"}),
    "experiments.Compare": (experiments.Compare, lambda c: {**c.problems(), "contenders": (c.contender,)}),
    "experiments.Tradeoff": (experiments.Tradeoff, lambda c: c.problems()),
    "experiments.Ablation": (experiments.Ablation, lambda c: {**c.problems(), "contenders": (c.contender,)}),
    "experiments.InitScale": (experiments.InitScale, lambda c: {**c.problems(), "who": c.contender}),
    "experiments.Transfer": (experiments.Transfer, lambda c: {**c.problems(), "who": c.contender}),
    "experiments.Sequence": (experiments.Sequence, lambda c: {**c.problems(), "contenders": (c.contender,)}),
    "experiments.Modality": (experiments.Modality, lambda c: {**c.problems(), "contenders": (c.contender,)}),
    "experiments.Decathlon": (
        experiments.Decathlon,
        lambda c: {**c.problems(), "contenders": (c.contender,), "baseline": c.contender},
    ),
    "experiments.run_experiment": (
        experiments.run_experiment,
        lambda c: {"experiment": c.experiment, "results_folder": c.folder / "runs"},
    ),
    "experiments.read_results": (experiments.read_results, lambda c: {"path": c.results}),
    "experiments.write_csv": (experiments.write_csv, lambda c: {"results": [c.result], "path": c.folder / "new"}),
    "report.build": (report.build, lambda c: {"results": [c.result]}),
    "report.write": (report.write, lambda c: {"results": c.results, "out": c.folder / "page"}),
    "report.table": (report.table, lambda c: {"results": [c.result]}),
    "report.sweep_table": (report.sweep_table, lambda c: {"results": [c.result]}),
    "report.plot": (report.plot, lambda c: {"results": [c.result], "path": c.folder / "plot.svg"}),
    "report.Look": (report.Look, lambda c: {}),
    "report.Look.colour": (report.Look.colour, lambda c: {"self": report.Look(), "number": 0}),
    "report.Look.series": (report.Look.series, lambda c: {"self": report.Look(), "number": 0}),
    "report.page": (report.page, lambda c: {"report": report.build([c.result])}),
    "report.markdown": (report.markdown, lambda c: {"report": report.build([c.result]), "figures": "x"}),
    "Method.of": (visadapt.Bottleneck.of, lambda c: {"options": {}}),
    "frozen.CachedPrefix.check": (
        CachedPrefix.check,
        lambda c: {"self": c.cached, "model": c.cached.prefix.model, "task": "a"},
    ),
    "serving.Server.predict": (awaited(Server.predict), lambda c: {"self": c.server, "task": "a", "inputs": [b""]}),
    "serving.Server.stop": (Server.stop, lambda c: {"self": c.server}),
    "training.ready": (training.ready, lambda c: {"inputs": c.x}),
    "training.TensorBoard": (training.TensorBoard, lambda c: {"folder": c.folder / "curves"}),
    "training.Recipe.factor": (training.Recipe.factor, lambda c: {"self": training.Recipe(), "step": 0, "steps": 3}),
    "training.Recipe.make_optimizer": (
        training.Recipe.make_optimizer,
        lambda c: {"self": training.Recipe(), "target": target_of(c.model, "a"), "steps": 3},
    ),
    "training.Samples.take": (
        training.Samples.take,
        lambda c: {"self": training.Samples(c.x), "index": torch.tensor([0])},
    ),
    "data.ImageSplit.subset": (data.ImageSplit.subset, lambda c: {"self": c.images, "indices": [0]}),
    "data.TextSplit.subset": (data.TextSplit.subset, lambda c: {"self": c.texts, "indices": [0]}),
    "data.ImageSet.holdout": (data.ImageSet.holdout, lambda c: {"self": c.set, "n": 2}),
    "data.ImageFiles": (data.ImageFiles, lambda c: {"items": c.images.images, "labels": c.images.labels}),
    "data.ImageFiles.subset": (data.ImageFiles.subset, lambda c: {"self": c.files, "indices": [0]}),
    "data.ImageFiles.read_as": (data.ImageFiles.read_as, lambda c: {"self": c.files, "pixels": c.files.pixels}),
    "data.ImageFiles.batches": (data.ImageFiles.batches, lambda c: {"self": c.files, "batch_size": 2}),
    "experiments.Result": (Result, lambda c: vars(c.result)),
    "experiments.Crossmodal": (
        experiments.Crossmodal,
        lambda c: {**c.problems(), "contenders": ((c.contender,),)},
    ),
    "experiments.Contender.with_variant": (
        experiments.Contender.with_variant,
        lambda c: {"self": c.contender, "method": visadapt.Full()},
    ),
    "experiments.Contender.put": (
        experiments.Contender.put,
        lambda c: {"self": c.contender, "problem": c.problem, "seed": 0},
    ),
}

NUMBERS = (-1, -0.5, math.nan, math.inf, 10**30, 10**5000)


class Unprintable:
    """Of a stranger's class: it cannot be shown, compared or counted."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


class Unreadable(list[Any]):
    """A list that raises when it is read."""

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no elements")

    __len__ = __iter__  # type: ignore[assignment]


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]

VALUES: tuple[tuple[Any, str], ...] = (
    (None, r"None"),
    (object(), r"(?!)"),
    (b"x", r"(?!)"),
    (3 + 4j, r"(?!)"),
    (7, r"\bint\b|\bfloat\b|Column"),
    (2.5, r"\bfloat\b"),
    (True, r"\bbool\b"),
    ("no such thing", r"\bstr\b|Path|Column|Metric|Loss|device"),
    ([object()], r"(?!)"),
    ({"x": object()}, r"(?!)"),
    (torch.zeros(2), r"Tensor"),
    (nn.Linear, r"Callable"),
    (Unprintable(), r"(?!)"),
    (DEEP, r"(?!)"),
)
"""A value, and what an annotation must say to take values of its type."""

OPEN = r"\bAny\b|Where|Prepare|Augment|Pixels"
"""Annotations of arguments that take anything, or what only a call can tell."""

MEANT = {
    ("inject", "model", nn.Linear),
    ("training.fit", "log", nn.Linear),
    ("split", "axis", -1),
    ("experiments.Result", "score", -1),
    ("experiments.Result", "score", -0.5),
    *(
        (name, "seed", -1)
        for name in (
            "cache_prefix",
            "training.fit",
            "data.load_text",
            "data.load_images",
            "data.ImageSet.holdout",
            "data.ImageFiles.batches",
            "experiments.Contender.put",
        )
    ),
}
"""Calls that are right after all."""


def wrong(name: str) -> Iterator[tuple[str, Any]]:
    """Arguments of a callable, each with a value that it cannot take."""
    function, _ = CALLS[name]
    source = getattr(visadapt, name, function) if "." not in name else function
    for parameter in inspect.signature(source).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name == "self":
            continue
        annotation = str(parameter.annotation)
        if re.search(OPEN, annotation):
            continue
        for value, accepted in VALUES:
            if not re.search(accepted, annotation):
                yield parameter.name, value
        if re.search(r"\bint\b|\bfloat\b", annotation) and "Mapping" not in annotation:
            for number in NUMBERS:
                if isinstance(number, int) or re.search(r"\bfloat\b", annotation):
                    yield parameter.name, number


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("calls"))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_an_error_that_names_it_and_changes_nothing(context: Context, name: str) -> None:
    function, right = CALLS[name]
    before, shape, state = snapshot(context.model), anatomy(context.model), context.state()
    failures = []
    for argument, value in wrong(name):
        if any((name, argument, shown(value)) == (*entry[:2], shown(entry[2])) for entry in MEANT):
            continue
        call = f"{name}({argument}={shown(value, 60)})"
        try:
            function(**{**right(context), argument: value})
            failures.append(f"{call}: nothing was said")
        except VisadaptError as error:
            if not re.search(rf"\b{argument}\b", str(error)) and NAMED.get(argument, argument) not in str(error):
                failures.append(f"{call}: not named: {error!s:.150}")
        except Exception as error:
            failures.append(f"{call}: {type(error).__name__}: {error!s:.100}")
        if context.state() != state:
            failures.append(f"{call}: a task, a file or the random state was changed")
            break
    assert same(context.model.state_dict(), before)
    assert anatomy(context.model) == shape
    assert not failures, "\n".join(failures)


NAMED = {
    "task": "task",
    "into": "task's name",
    "how": "way to combine",
    "norms": "norm policy",
    "head": "head",
    "path": "file",
    "place": "image",
    "device": "device",
}
"""How messages call some arguments."""


PATHS = [
    (name, parameter.name)
    for name, (function, _) in CALLS.items()
    for parameter in inspect.signature(
        getattr(visadapt, name, function) if "." not in name else function
    ).parameters.values()
    if "PathLike" in str(parameter.annotation)
]


@pytest.mark.parametrize(("name", "argument"), PATHS)
@pytest.mark.parametrize("path", ["a\0b", "\ud800", "a" * 5000, b"bytes", Unprintable()])
def test_a_path_that_no_file_can_have_is_refused(context: Context, name: str, argument: str, path: Any) -> None:
    function, right = CALLS[name]
    with pytest.raises(VisadaptError) as caught:
        function(**{**right(context), argument: path})
    str(caught.value).encode()
    assert "\0" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(context: Context) -> None:
    numpy = pytest.importorskip("numpy")
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="a", where="layer4", norms="frozen", num_classes=3)
    for seed in (3, numpy.int64(3)):
        kept = visadapt.cache_prefix(model, "a", context.x, seed=seed)
        kept.prefix.close()
        assert kept.identity["seed"] == 3
        assert type(kept.identity["seed"]) is int


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: visadapt.decide(c.model, "image"), "inputs must be a tensor"),
        (lambda c: visadapt.decide(c.model, {1: c.x}), "inputs must be a tensor"),
        (lambda c: visadapt.activate(c.model, Unreadable()), "task must be"),
        (lambda c: visadapt.inject(c.model, m=2, task="c", where=torch.tensor(1)), "where= must be"),
        (lambda c: visadapt.split(c.model, torch.tensor(1.0), ["a"]), "logits must have one row"),
        (lambda c: visadapt.merge_error(c.model, nn.Linear(2, 2), "a"), "merged must be a merge of this model"),
        (lambda c: export(c.model, c.folder / "e.pt2", task="a", example="x"), "example must be a batch"),
        (lambda c: training.predict(c.model, "a", torch.tensor(1)), "one entry per sample"),
        (lambda c: data.normalize(c.images.images, device="no such"), "device 'no such' cannot be used"),
        (lambda c: data.read_images([torch.zeros(3, 8, 8)], size=8), r"must be uint8 of shape \(3, H, W\)"),
    ],
)
def test_what_only_the_call_itself_can_tell(context: Context, call: Callable[[Context], Any], words: str) -> None:
    with pytest.raises(VisadaptError, match=words):
        call(context)


def test_there_are_many() -> None:
    assert sum(len(list(wrong(name))) for name in CALLS) >= 1500


RETURNED = {
    *("Prediction", "Site", "Sites"),
    "serving.Answer",
    *("training.Epoch", "training.Fit"),
    *("report.Report", "report.Claim", "report.Section", "report.Drawing"),
}
"""What the library returns or raises; users read it, and do not make it."""

CALLED = {
    *(f"Method.{name}" for name in ("build", "parts", "check", "no_sites", "count")),
    *("report.Look.panels", "report.Look.legend", "report.Drawing.render"),
}
"""What the library calls, in subclasses and figures."""

PYTHON = {"training.Recipe.replace", "experiments.Contender.with_recipe"}
"""Take the fields of a class by name; that class checks them."""


def public() -> Iterator[tuple[str, Any]]:
    """Everything that can be called with arguments, by name; an exception takes any, as Python's own."""
    for module in (visadapt, data, experiments, report, serving, training):
        prefix = module.__name__.removeprefix("visadapt").removeprefix(".")
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if (
                name.startswith("_")
                or not getattr(value, "__module__", "").startswith("visadapt")
                or not callable(value)
                or (inspect.isclass(value) and issubclass(value, BaseException))
            ):
                continue
            full = f"{prefix}.{name}".removeprefix(".")
            if inspect.signature(value).parameters:
                yield full, value
            for inner, method in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(method, "__func__", method)
                if (
                    not inner.startswith("_")
                    and inspect.isfunction(function)
                    and len(inspect.signature(function).parameters) > 1
                ):
                    yield f"{full}.{inner}", function


def test_every_public_name_is_called_wrongly() -> None:
    left = {name for name, _ in public()} - {*CALLS, *RETURNED, *CALLED, *PYTHON}
    # of subclasses, the library calls what it calls of their base classes
    methods = {f"{cls}.{name}" for cls in visadapt.METHODS for name in ("build", "parts", "check", "no_sites", "count")}
    own = {name for name in left if name.endswith((".runs", "Problem.prepare"))}
    left -= methods | own | {"experiments.Experiment", "experiments.Problem", "Method"}
    assert not left
