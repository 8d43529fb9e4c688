"""No option is ignored in silence: where one has no effect, it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
from typer.main import get_command
from typer.testing import CliRunner

import visadapt
from tests.cli.photos import write_photos
from tests.cli.test_cli import tiny_bert
from visadapt.cli.app import EXAMPLES, app
from visadapt.data.inputs import ImageInputs, TextInputs, described
from visadapt.opening.backbones import open_backbone

BUILD = "--build pretrained=false --build channels=[8,8,16,16]"
TIMM = f"--backbone timm/resnet10t {BUILD}"
IMAGES = f"train {{images}} {TIMM} --size 32 --m 2 --epochs 1 --out {{new}}/o.visadapt"
TEXTS = "train {texts} --backbone hf/{bert} --m 2 --epochs 1 --out {new}/o.visadapt"
SEEN = f"evaluate {{task}} {{images}} {TIMM}"
READ = "evaluate {read} {texts} --backbone hf/{bert}"
LOOK = f"predict {{images}}/red/0.png --task {{task}} {TIMM}"
ASK = "predict {lines} --task {read} --backbone hf/{bert}"
SERVE = f"serve {{task}} {TIMM} --port 0"
PUSH = f"push {{task}} me/flowers {TIMM} --no-card"
OF_IMAGES = "experiment compare --problem bundled/resnet50:cifar10 --results {new}/r"
OF_TEXTS = "experiment compare --problem bundled/minilm:tweets --results {new}/r"
PROBE = f"{OF_IMAGES} --contender 'linear probe'"

UNUSED: tuple[tuple[str, str], ...] = (
    *(("summary {task}", option) for option in (
        "--method Parallel", "--m 2", "--option rank=2", "--norms frozen", "--where layer4", "--build pretrained=false"
    )),
    *((IMAGES, option) for option in (
        "--text a", "--image file", "--label y", "--regression", "--multi-label ;", "--no-header", "--delimiter ;",
        "--encoding latin-1", "--root .", "--length 8", "--rand-augment rand-m9",
    )),
    *((TEXTS, option) for option in (
        "--image file", "--size 32", "--augment", "--random-crop 0.5", "--rand-augment rand-m9", "--mixup 0.2",
        "--cutmix 1", "--damaged 0.5", "--memory 1 --no-quick",
    )),
    (IMAGES.replace("--m 2", "--method Parallel"), "--m 2"),
    (IMAGES.replace("--m 2", "--method Linear"), "--where layer4"),
    *((SEEN, option) for option in (
        "--text a", "--image file", "--label y", "--no-header", "--delimiter ;", "--encoding latin-1", "--root .",
        "--seed 1",
    )),
    *((READ, option) for option in ("--image file", "--damaged 0.5", "--memory 1", "--seed 1")),
    *((LOOK, option) for option in (
        "--text a", "--image file", "--root .", "--no-header", "--delimiter ;", "--encoding latin-1", "--force",
    )),
    *((ASK, option) for option in ("--text a", "--image file", "--root .", "--no-header", "--delimiter ;")),
    (ASK.replace("{lines}", "-"), "--encoding latin-1"),
    ("predict {lines} --task {values} --backbone hf/{bert}", "--top 2"),
    *((f"{SERVE} --exact", option) for option in ("--max-batch 2", "--max-wait-ms 1")),
    (f"{SERVE} --engine ray", "--log-requests"),
    *((PUSH, option) for option in ("--metric accuracy=1", "--license mit")),
    *((OF_TEXTS, option) for option in ("--size 32", "--augment", "--mirror", "--image file")),
    *((OF_IMAGES, option) for option in ("--length 8", "--text a", "--build pretrained=false")),
    *((command, option) for command in (OF_IMAGES, OF_TEXTS) for option in (
        "--label y", "--regression --metric pearson", "--multi-label ; --metric mean_ap", "--no-header",
        "--delimiter ;", "--encoding latin-1",
    )),
    (f"{OF_IMAGES} --no-augment", "--mirror"),
    (OF_IMAGES.replace("compare", "tradeoff"), "--fast"),
    *((PROBE, option) for option in ("--epochs 2", "--fast")),
    *((command, "--root .") for command in (OF_IMAGES, OF_TEXTS)),
    (OF_IMAGES.replace("compare", "tradeoff"), "--contender 'bottleneck m=8'"),
)  # fmt: skip
"""Calls that are right, and an option that has no effect in each."""

PERMISSIONS = {"--force", "--online", "--damaged", "--memory"}
"""What they allow may not be needed."""

ALWAYS = {
    "sites": "--where --build",
    "train": "--out --backbone --task --method --option --norms --quick --recipe --epochs --lr --batch-size --patience "
    "--head-first --metric --seed --device --precision --checkpoint --log --build",
    "evaluate": "--metric --split --batch-size --device --precision --backbone --build --json",
    "predict": "--task --format --out --batch-size --device --precision --backbone --build",
    "serve": "--host --port --max-tasks --max-queue --workers --engine --token-file --decider --exact --device "
    "--backbone --build",
    "merge": "--out --fold --backbone --build",
    "export": "--out --merge --backbone --build",
    "push": "--card --private --revision --backbone --build",
    "experiment": "--problem --results --seeds --train --validation --test --metric --engine --processes --device",
    "report": "--out --title",
}
"""Options that take effect in every call; head-first says what was done."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unused")
    write_photos(root / "images", 4)
    texts = root / "texts.tsv"
    texts.write_text("text\tlabel\n" + "".join(f"this is {i}\t{'no' if i % 2 else 'yes'}\n" for i in range(12)))
    (lines := root / "lines.txt").write_text("one\ntwo\n")
    tiny_bert(root / "bert")
    files = {}
    for name, backbone, build, inputs, notes in (
        ("task", "timm/resnet10t", {"pretrained": False, "channels": [8, 8, 16, 16]}, ImageInputs(32), {}),
        ("read", f"hf/{root / 'bert'}", {}, TextInputs(f"hf/{root / 'bert'}", 16), {}),
        ("values", f"hf/{root / 'bert'}", {}, TextInputs(f"hf/{root / 'bert'}", 16), {"problem_type": "regression"}),
    ):
        model = open_backbone(backbone, build)
        labels = None if notes else ("no", "yes") if name == "read" else ("blue", "red")
        visadapt.inject(model, m=2, task="t", labels=labels, num_classes=2)
        notes |= {"backbone": {"name": backbone, "build": {}}, "inputs": described(inputs)}
        files[name] = visadapt.save(model, "t", root / f"{name}.visadapt", notes=notes)
    return {"images": root / "images", "texts": texts, "lines": lines, "bert": root / "bert", **files}


@pytest.mark.parametrize("command", dict.fromkeys(words.split()[0] for words, _ in UNUSED))
def test_an_option_without_effect_is_refused_by_name(command: str, places: dict[str, Path], tmp_path: Path) -> None:
    wrong = []
    for number, (words, given) in enumerate(UNUSED):
        if words.split()[0] != command:
            continue
        (new := tmp_path / f"{number}").mkdir()
        # words are quoted where they hold a space
        typed = [part for n, text in enumerate(f"{words} {given}".split("'")) for part in (
            [text] if n % 2 else text.split())]  # fmt: skip
        answer = CliRunner().invoke(app, [word.format(**places, new=new) for word in typed])
        errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        option = given.split()[0].replace("--no-", "--")
        named = errors and any(word in errors[0] for word in (option, option.strip("-").replace("-", "_")))
        if answer.exit_code not in (1, 2) or not named or "Traceback" in answer.output:
            wrong.append(f"{words} {given}: code {answer.exit_code}, {answer.stderr.splitlines()[-1:]}")
        if left := list(new.iterdir()):
            wrong.append(f"{words} {given} left {left}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", [function.__name__ for function in EXAMPLES])
def test_every_option_is_looked_at(command: str) -> None:
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = {parameter.opts[0] for parameter in parameters if parameter.opts[0].startswith("--")}
    refused = {given.split()[0].replace("--no-", "--") for words, given in UNUSED if words.split()[0] == command}
    always = set(ALWAYS.get(command, "").split())
    assert not options - refused - always - PERMISSIONS, options - refused - always
    assert not always - options, always - options
