"""Every option of every command, with values that cannot be meant: one line that names it, and code 1 or 2."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

pytest.importorskip("typer")
pytest.importorskip("uvicorn")
from typer.models import OptionInfo
from typer.testing import CliRunner, Result

import visadapt
from tests.cli.photos import write_photos
from tests.full_disk import RESULT
from tests.opening.hub_server import Hub, serving
from visadapt.cli.app import EXAMPLES, app
from visadapt.data.inputs import ImageInputs, described
from visadapt.experiments import write_csv
from visadapt.opening.backbones import open_backbone
from visadapt.optional import available
from visadapt.printable import printable
from visadapt.serving import running

SMALL = {"pretrained": False, "channels": [8, 8, 16, 16]}

BUILD = ["--build", "pretrained=false", "--build", "channels=[8,8,16,16]"]

TIMM = ["--backbone", "timm/resnet10t", *BUILD]

RIGHT: dict[str, list[str]] = {
    "sites": ["timm/resnet10t", *BUILD],
    "summary": ["timm/resnet10t", *BUILD],
    "train": ["{images}", *TIMM, "--size", "32", "--epochs", "1", "--m", "2", "--out", "{new}/o.visadapt"],
    "evaluate": ["{task}", "{images}", *TIMM],
    "predict": ["{images}/red/0.png", "--task", "{task}", *TIMM],
    "push": ["{task}", "user/t", *TIMM],
    "serve": ["{task}", *TIMM, "--port", "0"],
    "merge": ["{task}", "--out", "{new}/o.safetensors", *TIMM],
    "export": ["{task}", "--out", "{new}/o.pt2", *TIMM],
    "experiment": ["compare", "--problem", "bundled/resnet50:cifar10", "--contender", "linear probe",
                   "--results", "{new}/results"],
    "report": ["{results}", "--out", "{new}/page"],
}  # fmt: skip
"""A call of each command that is right."""

NUMBERS = ("x", "", "nan", "inf", "-1", "9" * 30, "1e999", "½", "0x10", "1,5")

WORDS = ("", "no such thing", "\x1b[31m", "a\nb", "x" * 5000)

FEW = ("", "nan", "9" * 30, "\x1b[31m", "{new}/no/such")
"""What the quick test tries."""

PATHS = ("", "{new}/no/such", "{new}", "{broken}", "\x00")


def options(command: str) -> Iterator[tuple[str, str]]:
    """Options of a command, from its function's annotations, each with a value that its type cannot take."""
    (function,) = (each for each in EXAMPLES if each.__name__ == command)
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        hint = parameter.annotation
        if get_origin(hint) is not Annotated:
            continue
        kind, info = get_args(hint)[:2]
        kinds = {kind, *get_args(kind)}
        if not isinstance(info, OptionInfo) or bool in kinds:
            continue
        # typer keeps the first of them as the default
        spelt = (info.default, *(info.param_decls or ()))
        declared = [text for text in spelt if isinstance(text, str) and text.startswith("--")]
        option = declared[0] if declared else f"--{name.replace('_', '-')}"
        for value in NUMBERS if kinds & {int, float} else PATHS if Path in kinds else WORDS:
            yield option, value


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, to which the library sends everything."""
    if not available("huggingface_hub"):
        yield Hub()
        return
    with serving() as found:
        for name, value in (("ENDPOINT", found.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
                            ("HF_HUB_CACHE", str(tmp_path / "cache")),
                            ("HUGGINGFACE_CO_URL_TEMPLATE",
                             f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")):  # fmt: skip
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "token-of-the-test")
        yield found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wrong")
    write_photos(root / "images", 10)
    model = open_backbone("timm/resnet10t", SMALL)
    visadapt.inject(model, visadapt.Parallel(), task="t", labels=("blue", "red"), num_classes=2)
    notes = {"backbone": {"name": "timm/resnet10t", "build": {}}, "inputs": described(ImageInputs(32))}
    task = visadapt.save(model, "t", root / "t.visadapt", notes=notes)
    (root / "broken").write_bytes(b"\x93broken")
    results = write_csv([RESULT], root / "results.csv")
    return {"images": root / "images", "task": task, "broken": root / "broken", "results": results}


HUGE = "9" * 30

MEANT = {
    # what `run_experiment` refuses, which does not run here
    *(("experiment", option, word) for option in ("--engine", "--device") for word in WORDS),
    *(("experiment", option, path) for option in ("--results",) for path in PATHS),
    ("experiment", "--processes", HUGE),
    *(("report", "--title", word) for word in WORDS),
    ("report", "--out", "{new}"),
    ("serve", "--decider", ""),  # "got the folder ."
    ("train", "--lr", HUGE),  # refused by the loss
    *((command, "--memory", HUGE) for command in ("train", "evaluate")),
    *((command, "--seed", "-1") for command in ("train", "evaluate")),
    ("train", "--task", "x" * 5000),
    ("train", "--log", "{broken}"),
    ("predict", "--top", HUGE),
    ("serve", "--max-wait-ms", HUGE),
}
"""Values that are possible after all."""


def complaint(option: str, value: str, answer: Result) -> str:
    """What is wrong with the answer to a wrong value; "" if nothing is."""
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        return f"raised {answer.exception!r:.200}"
    if answer.exit_code not in (1, 2):
        return f"code {answer.exit_code}"
    lines = answer.stderr.strip().splitlines()
    if "Traceback" in answer.output or "\x1b" in answer.stderr:
        return f"shows {answer.stderr!r:.300}"
    errors = [line for line in lines if line.lower().startswith("error")]
    if len(errors) != 1 or (answer.exit_code == 1 and lines[-1] != errors[0]):
        return f"says {lines}"
    told = errors[0]
    named = any(word.removesuffix("s") in told.lower() for word in option.strip("-").split("-"))
    if not named and not (value and any(shown in told for shown in (value, printable(value), " ".join(value.split())))):
        return f"does not name it: {errors[0]:.200}"
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("command", RIGHT)
def test_a_wrong_value_is_one_line_that_names_the_option(
    command: str, every: bool, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(
        "visadapt.cli.experiment.run_experiment", lambda plan, *_, **__: list(plan.runs(lambda _: None))
    )
    monkeypatch.setattr(running, "_bound", lambda options: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(running.Processes, "run", lambda self: self.sockets[0].close())
    wrong = []
    for number, (option, value) in enumerate(options(command)):
        if (command, option, value) in MEANT or (not every and value not in FEW):
            continue
        (new := tmp_path / f"{number}").mkdir()
        words, value = ([w.format(**places, new=new) for w in each] for each in (RIGHT[command], [value]))
        answer = CliRunner().invoke(app, [command, *words, option, *value])
        if said := complaint(option, value[0], answer):
            wrong.append(f"{command} {option} {value[0]!r:.60}: {said}")
        if left := [path.name for path in new.rglob("*") if path.name != "results"]:
            wrong.append(f"{command} {option} {value[0]!r:.60} left {left}")
        if hub.repositories:
            wrong.append(f"{command} {option} {value[0]!r:.60} made {list(hub.repositories)}")
            hub.repositories.clear()
    assert not wrong, "\n".join(wrong)
