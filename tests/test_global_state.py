"""State of the whole process: who may change it, who may read files without bounds, and that calls leave it alone."""

from __future__ import annotations

import ast
import copy
import csv
import importlib
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import visadapt
from tests.models import every_module, short
from tests.test_structure import FILES, tree
from tests.test_wrong_calls import CALLS, Context
from visadapt.backbone.trace import quiet
from visadapt.export.program import export
from visadapt.training import Recipe, evaluate, fit

NAMED = {
    # reading without bounds, or what could run code
    "json.loads": {"bounded_json", "cli.options", "serving.running", "data.image_sources"},
    "json.load": set(),
    "torch.load": set(),
    "pickle": set(),
    "eval": {"arguments"},
    "exec": set(),
    "load_file": set(),
    "safe_open": set(),
    "os.open": {"reading", "files", "frozen.cache_file", "cli.app", "cli"},
    "read_bytes": set(),
    # two of them call the function of that name in data.tables
    "read_text": {"data.bundled", "data.image_sources", "serving.app", "cli.predict", "data.tables"},
    "gzip.open": {"data.text"},
    "gzip.GzipFile": set(),
    "gzip.decompress": set(),
    "zipfile.ZipFile": {"data.bounded"},
    "tarfile.open": set(),
    # the process
    "os.umask": set(),
    "os.chdir": set(),
    "os.putenv": set(),
    "os.environ.update": {"serving.running"},
    "os.environ.pop": {"serving.running"},
    "os.environ.setdefault": set(),
    "os.environ.clear": set(),
    "signal.signal": {"serving.cluster", "cli.terminated"},
    "locale.setlocale": set(),
    "random.seed": {"data.augmentation"},
    "sys.setrecursionlimit": set(),
    "sys.setswitchinterval": set(),
    "set_start_method": set(),
    "csv.field_size_limit": {"data.tables"},
    "socket.setdefaulttimeout": set(),
    # warnings and logs, inside a guard
    "warnings.filterwarnings": set(),
    "warnings.simplefilter": {"backbone.trace"},
    "warnings.catch_warnings": {"backbone.trace", "cli.app"},
    # torch
    "torch.manual_seed": {
        *("training.rng", "combining", "opening.backbones", "cli.train"),
        *("experiments.contenders", "experiments.problems"),
    },
    "torch.seed": set(),
    "torch.set_rng_state": {"training.rng"},
    "torch.cuda.set_rng_state": {"training.rng", "training.graphs"},
    "torch.set_num_threads": {"experiments.executors"},
    "torch.set_num_interop_threads": set(),
    "torch.set_default_dtype": set(),
    "torch.set_default_device": set(),
    "torch.set_grad_enabled": set(),
    "torch.set_float32_matmul_precision": {"backbone.full_precision"},
    "torch.use_deterministic_algorithms": set(),
    "torch.autograd.set_detect_anomaly": set(),
}
"""Calls, and the only files that may make them: each is looked at when it is added, and restores what it changes."""


@cache
def nodes() -> dict[str, list[ast.AST]]:
    """Return what each file of the package consists of; the tests of other files need not wait for it."""
    return {file.removeprefix("visadapt."): list(ast.walk(tree(file))) for file in FILES}


def round_trip(call: ast.Call) -> bool:
    """``json.loads(json.dumps(…))`` reads what this program has written."""
    return any(isinstance(a, ast.Call) and ast.unparse(a.func) == "json.dumps" for a in call.args)


def users(name: str) -> set[str]:
    """Files that call a function by its name or by its dotted name."""
    methods = name not in ("eval", "exec")  # a module has a method of that name
    return {file for file, spelled in called() if spelled == name or (methods and spelled.endswith(f".{name}"))}


@cache
def called() -> set[tuple[str, str]]:
    """Return each file with the functions that it calls."""
    return {
        (file, ast.unparse(node.func))
        for file, content in nodes().items()
        for node in content
        if isinstance(node, ast.Call) and not round_trip(node)
    }


@pytest.mark.parametrize("name", NAMED)
def test_who_may_call_it(name: str) -> None:
    assert users(name) == NAMED[name]


def test_nothing_of_torch_or_of_the_environment_is_assigned() -> None:
    found = {}
    for file, content in nodes().items():
        for node in content:
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            for target in map(ast.unparse, targets):
                if target.startswith(("torch.", "os.environ", "sys.", "warnings.", "pil.", "signal.")):
                    found[target] = file
    assert found == {
        "warnings.showwarning": "cli.app",
        "pil.MAX_IMAGE_PIXELS": "data.bounded",
        # by the command's own supervisor, which computes nothing, for the processes that it starts
        "os.environ[REPLACES]": "serving.processes",
    }


LOGGERS = ("", "torch", "torch._subclasses.fake_tensor", "visadapt")

FLAGS = {
    "torch.backends.cudnn": ("enabled", "benchmark", "deterministic", "allow_tf32"),
    "torch.backends.cuda.matmul": ("allow_tf32",),
    "torch.backends.mkldnn": ("enabled",),
}


def state() -> dict[str, Any]:
    """What belongs to the whole process, the random generators apart."""
    umask = os.umask(0)
    os.umask(umask)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    flags = {f"{name}.{flag}": getattr(eval(name), flag) for name, names in FLAGS.items() for flag in names}
    return {
        "environment": dict(os.environ),
        "umask": umask,
        "folder": Path.cwd(),
        "handlers": handlers,
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "interpreter": (sys.getrecursionlimit(), sys.getswitchinterval(), list(sys.path)),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "locale": locale.setlocale(locale.LC_ALL),
        "csv": csv.field_size_limit(),
        "timeout": socket.getdefaulttimeout(),
        "images": Image.MAX_IMAGE_PIXELS,
        "logs": (logging.root.handlers[:], *(logging.getLogger(name).level for name in LOGGERS)),
        "threads": torch.get_num_threads(),
        "torch": (
            *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
            *(torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()),
            *(torch.is_anomaly_enabled(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")),
        ),
        **flags,
    }


def generators() -> dict[str, Any]:
    return {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}


ELSEWHERE = {
    "push_to_hub",
    "experiments.run_experiment",
    "training.tokenised",
    "using",
    *(cls.__name__ for cls in visadapt.METHODS.values()),
}
"""Needs a network or a tokenizer, trains for long, or is a context or a plain description."""

DRAWS = {"inject", "load", "fit_decider", "training.Recipe"}
"""May draw from torch's generator, as making a module does."""

PUTS = {
    *("combine", "serving.Server", "inject", "load", "remove", "eject", "lean", "unlean", "fold", "merge"),
    *("fit_decider", "load_decider"),
}
"""Changes which modules there are, or puts the model that it serves into eval mode."""


def modes_of(model: nn.Module) -> dict[str, bool]:
    """The mode of each module, those of all tasks included."""
    return {path: module.training for path, module in every_module(model).items()}


COMPILER = "TORCHINDUCTOR_CACHE_DIR"
"""Set by torch itself when it compiles or exports, once and for all."""


def test_calls_leave_the_process_and_the_modes_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("accelerate")  # it silences a warning of torch for good when it is imported
    context = Context(tmp_path)
    failures, written = [], set()
    # kernels of torch read the environment in other threads, which crashes where a variable comes or goes meanwhile
    for function in ("putenv", "unsetenv"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda key, *value, real=real: (written.add(key.decode()), real(key, *value)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (call, arguments) in CALLS.items():
            if name in ELSEWHERE:
                continue
            mine = copy.copy(context)
            mine.model, mine.folder = copy.deepcopy(context.model), tmp_path / name
            mine.folder.mkdir()
            mine.model.train()
            mine.model.layer1.eval()  # a part that its user keeps in eval mode
            modes = modes_of(copy.deepcopy(mine.model))  # tasks that are not in use have not followed yet
            before, drawn = state(), generators()
            with suppress(visadapt.VisadaptError):  # what is refused changes nothing either
                call(**arguments(mine))
            failures += [f"{name}: environment variable {key}" for key in written - {COMPILER}]
            written.clear()
            after = state()
            failures += [f"{name}: {key}" for key in before if before[key] != after[key]]
            if name not in DRAWS and generators() != drawn:
                failures.append(f"{name}: random numbers")
            if name not in PUTS and modes_of(mine.model) != modes:
                failures.append(f"{name}: modes")
    assert not failures, "\n".join(failures)


def test_training_and_measuring_keep_the_mode_of_each_module() -> None:
    model = visadapt.inject(short(), m=2, task="t", num_classes=3)
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    data = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    evaluate(model, "t", data)
    assert [module.training for module in model.modules()] == modes
    fit(model, "t", data, data, Recipe(epochs=1, batch_size=2), progress=False)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("active", ["idle", "t"])
def test_the_modes_of_tasks_that_are_not_in_use_are_kept(tmp_path: Path, active: str) -> None:
    model = short()
    for task in ("idle", "t", "other"):
        visadapt.inject(model, m=2, task=task, num_classes=3)
    model.train()
    all_train, modules = modes_of(model), every_module(model)
    for task in ("idle", "t"):
        # one module of a task that its user keeps in eval mode
        next(module for path, module in modules.items() if path.endswith(f".visadapt.{task}")).eval()
    visadapt.activate(model, active)
    modes = modes_of(model)
    data = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    evaluate(model, "t", data)
    assert modes_of(model) == modes
    fit(model, "t", data, data, Recipe(epochs=1, batch_size=2), progress=False)
    assert modes_of(model) == modes
    export(model, tmp_path / "t.pt2", task="t", example=data[0])
    assert modes_of(model) == modes
    # what is set for all afterwards reaches all
    model.eval()
    assert not any(modes_of(model).values())
    model.train()
    assert modes_of(model) == all_train


def test_blocks_that_overlap_in_threads_put_warnings_back(recwarn: pytest.WarningsRecorder) -> None:
    before = list(warnings.filters)
    first, second = quiet(), quiet()
    # two threads: the first to enter is the first to leave
    with first:
        second.__enter__()
    assert warnings.filters != before
    second.__exit__(None, None, None)
    assert warnings.filters == before


def test_threads_that_trace_leave_warnings_as_they_were() -> None:
    before = list(warnings.filters)

    def trace() -> None:
        for _ in range(3):
            visadapt.sites(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), example=torch.zeros(1, 3, 8, 8)
            )

    threads = [threading.Thread(target=trace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
