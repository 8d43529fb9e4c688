"""A file is data: whatever it says, no code of its choice runs, and no path or address of its choice is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import visadapt
from tests.models import ZOO
from tests.test_described_sizes import little_memory
from visadapt import VisadaptError
from visadapt.data import load_images, minilm_path, read_images
from visadapt.data.allowlist import OPTIONS, objections
from visadapt.data.file_requests import vetted
from visadapt.data.hub import resolve
from visadapt.data.inputs import TextInputs, from_description
from visadapt.data.processors import ProcessorInputs
from visadapt.data.repository_config import model_objections
from visadapt.experiments.record import Result, write
from visadapt.tensor_file import read_described, write_described

pytest.importorskip("typer")
from typer.testing import CliRunner
from typer.testing import Result as Answer

from visadapt.cli.app import app

COMMANDS = ("predict", "evaluate", "merge", "export")
BY_HAND = "--backbone NAME and --build KEY=VALUE"
SMALL = {"pretrained": False, "channels": [8, 16, 24, 32]}


@dataclasses.dataclass
class Traps:
    """A folder with everything that a hostile file may point at, and what was sprung."""

    folder: Path
    task: Path
    reached: list[Any]
    requests: list[str]
    port: int

    @property
    def marker(self) -> Path:
        """Written by code that runs."""
        return self.folder / "marker"

    def says(self, **notes: Any) -> Path:
        """A task file with other notes."""
        content = read_described(self.task, "visadapt", "task file")
        description = content.description
        description["notes"] = notes
        target = self.folder / "hostile.visadapt"
        write_described(target, "visadapt", description, content.tensors)
        return target

    def run(self, command: str, task: Path, *more: object, code: int = 1) -> Answer:
        """A command on a task file."""
        out = self.folder / ("out.pt2" if command == "export" else "out.safetensors")
        arguments = {
            "predict": ("predict", self.folder / "lines.txt", "--task", task),
            "evaluate": ("evaluate", task, self.folder / "data.tsv"),
            "summary": ("summary", task),
        }.get(command, (command, task, "--out", out))
        result = CliRunner().invoke(app, [str(word) for word in (*arguments, *more)])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        assert not out.exists() or code == 0
        return result

    def assert_quiet(self) -> None:
        assert not self.marker.exists(), "code of the file's author ran"
        assert self.reached == self.requests == [], "the network was used"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of a small ResNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve("timm/resnet18", pretrained=False, channels=SMALL["channels"]).eval()
    visadapt.inject(model, m=2, task="plain", labels=("a", "b"), num_classes=2)
    return visadapt.save(model, "plain", tmp_path_factory.mktemp("plain") / "plain.visadapt")


@pytest.fixture
def traps(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traps]:
    found = Traps(tmp_path, plain, [], [], 0)

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    found.port = server.server_port
    # the default of half a second would be waited for at the end of every test
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def connect(_: socket.socket, address: Any, **__: Any) -> None:
        found.reached.append(address)
        if address[:2] != ("127.0.0.1", found.port):
            raise ConnectionRefusedError("no network in tests")
        plain_connect(_, address)

    def lookup(host: Any, *arguments: Any, **options: Any) -> Any:
        found.reached.append(host)
        if host != "127.0.0.1":
            raise socket.gaierror("no network in tests")
        return plain_lookup(host, *arguments, **options)

    plain_connect, plain_lookup = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("a line\n", encoding="utf-8")
    (tmp_path / "data.tsv").write_text("text\tlabel\none\ta\ntwo\tb\n", encoding="utf-8")
    (tmp_path / "relative").mkdir()
    _remote_code(tmp_path / "code", found.marker)
    _pickle(tmp_path / "pickle", found.marker)
    for name in ("code", "pickle"):
        _cached(tmp_path / name, f"evil/{name}", tmp_path / "cache")
    yield found
    server.shutdown()
    server.server_close()


def _remote_code(folder: Path, marker: Path) -> None:
    """A repository of transformers whose model and tokenizer are Python of its own."""
    folder.mkdir()
    config = {
        "model_type": "evil",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForSequenceClassification": "evil.Model",
            "AutoTokenizer": ["evil.Tokenizer", None],
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _pickle(folder: Path, marker: Path) -> None:
    """A BERT whose weights are a pickle that calls a function."""
    ZOO["transformers/bert"].make().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(marker), protocol=2))


def _cached(folder: Path, name: str, cache: Path) -> None:
    """The folder as the hub's cache holds a repository."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40, encoding="utf-8")


# name and options of the backbone, with {folder} and {port}; what the error names
HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "code in a folder": ("hf/{folder}/code", {"trust_remote_code": True}, "trust_remote_code=True"),
    "a folder": ("hf/{folder}/code", {}, "the backbone 'hf/{folder}/code'"),
    "code in the cache": ("hf/evil/code", {"trust_remote_code": True}, "trust_remote_code=True"),
    "code of another repository": ("hf/evil/pickle", {"code_revision": "x"}, "code_revision='x'"),
    "a pickle": ("hf/evil/pickle", {"weights_only": False}, "weights_only=False"),
    "not safetensors": ("hf/evil/pickle", {"use_safetensors": False}, "use_safetensors=False"),
    "a cache": ("hf/evil/code", {"cache_dir": "{folder}"}, "cache_dir="),
    "a proxy": ("hf/evil/code", {"proxies": {"http": "127.0.0.1:{port}"}}, "proxies="),
    "a subfolder": ("hf/evil/code", {"subfolder": "../code"}, "subfolder="),
    "a kernel": ("hf/evil/code", {"attn_implementation": "evil/kernel"}, "attn_implementation must be one of"),
    "a revision that is a path": ("hf/evil/code", {"revision": "../../x"}, "revision must be a word"),
    "a relative folder": ("hf/relative", {}, "the backbone 'hf/relative'"),
    "a folder above": ("hf/../code", {}, "the backbone 'hf/../code'"),
    "an address": (
        "timm/resnet18",
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:{port}/w.pth", "hf_hub_id": None}},
        "pretrained_cfg_overlay=",
    ),
    "a configuration": (
        "timm/resnet18",
        {"pretrained_cfg": {"url": "http://127.0.0.1:{port}/w.pth"}},
        "pretrained_cfg=",
    ),
    "a checkpoint": ("timm/resnet18", {"checkpoint_path": "{folder}/pickle/pytorch_model.bin"}, "checkpoint_path="),
    "timm's folders": ("timm/local-dir:{folder}/code", {}, "the backbone 'timm/local-dir:{folder}/code'"),
    "timm's repositories": ("timm/hf-hub:evil/code", {}, "the backbone 'timm/hf-hub:evil/code'"),
    "torchvision's path": ("torchvision/../resnet18", {}, "the backbone 'torchvision/../resnet18'"),
    "weights at an address": (
        "torchvision/resnet18",
        {"weights": "http://127.0.0.1:{port}/w"},
        "weights must be null or",
    ),
    "a bundled path": ("bundled/../../x", {}, "the backbone 'bundled/../../x'"),
    "a place that is none": ("file/{folder}/code", {}, "the backbone 'file/{folder}/code'"),
    "a function": ("timm/resnet18", {"norm_layer": "os.system"}, "norm_layer='os.system'"),
    "classes that are a flag": ("timm/resnet18", {"num_classes": True}, "num_classes must be an integer"),
    "too many classes": ("timm/resnet18", {"num_classes": 10**9}, "num_classes must be an integer from 0 to 65536"),
    "a size that is a text": ("timm/resnet18", {"img_size": "224"}, "img_size must be an integer"),
    "too many sizes": ("timm/resnet18", {"channels": [8] * 99}, "channels must be an integer"),
    "a rate that is no number": (
        "timm/resnet18",
        {"drop_rate": float("nan")},
        "drop_rate must be a number from 0 to 1",
    ),
}


def _filled(value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, known) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, known) for one in value]
    return value.replace("{folder}", str(known["folder"])).replace("{port}", str(known["port"])) if isinstance(
        value, str
    ) else value  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_no_file_may_choose_is_refused_by_name(traps: Traps, command: str) -> None:
    for case, (name, build, expected) in HOSTILE.items():
        name, build, expected = (_filled(each, {"folder": traps.folder, "port": traps.port})
                                 for each in (name, build, expected))  # fmt: skip
        result = traps.run(command, traps.says(backbone={"name": name, "build": build}))
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: "), case
        assert "hostile.visadapt must not choose" in line, case
        assert expected in line, case
        assert BY_HAND in line, case
        assert result.stdout == ""
        traps.assert_quiet()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("online", [(), ("--online",)])
@pytest.mark.parametrize("repository", ["code", "pickle"])
def test_a_repository_that_a_file_names_runs_no_code(
    traps: Traps, command: str, repository: str, online: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even from the cache, where the user may have it for another reason."""
    if online:
        folder = traps.folder / "cache" / f"models--evil--{repository}" / "snapshots" / ("0" * 40)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    result = traps.run(command, traps.says(backbone={"name": f"hf/evil/{repository}", "build": {}}), *online)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    pickled = "must have a config.json and safetensors" if online else "the safetensors weights of 'hf/evil/pickle'"
    assert {"code": "cannot load 'hf/", "pickle": pickled}[repository] in line
    traps.assert_quiet()


def test_an_adapters_repository_does_not_choose_its_base(traps: Traps) -> None:
    folder = traps.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(traps.folder / "code")}))
    _cached(folder, "evil/adapter", traps.folder / "cache")
    result = traps.run("predict", traps.says(backbone={"name": "hf/evil/adapter"}))
    assert "'hf/evil/adapter', which a file names, must be a whole model, not an adapter" in result.stderr
    traps.assert_quiet()


def _repository(traps: Traps, name: str, files: dict[str, Any]) -> str:
    """A repository in the cache, with weights that fit nothing; the name of its backbone."""
    folder = traps.folder / name
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(json.dumps(_filled(content, {"folder": traps.folder, "port": traps.port})))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    _cached(folder, f"evil/{name}", traps.folder / "cache")
    return f"hf/evil/{name}"


BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 99}  # fmt: skip
WRAPPER = {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 2}

# the config.json of a repository, and what the error names
CONFIGS: dict[str, tuple[Any, str]] = {
    "a kernel": ({**BERT, "attn_implementation": "evil/kernel"}, "must not choose attn_implementation='evil/kernel'"),
    "a kernel by another name": ({**BERT, "_attn_implementation": "evil/kernel:run"}, "_attn_implementation="),
    "a kernel of a part": ({**BERT, "x": [{"attn_implementation": {"": "sdpa", "y": "a/b"}}]}, "attn_implementation="),
    "experts": ({**BERT, "experts_implementation": "sonicmoe"}, "experts_implementation='sonicmoe'"),
    "kernels of a quantisation": ({**BERT, "quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    "a checkpoint by timm": (
        {**WRAPPER, "model_args": {"checkpoint_path": "{folder}/pickle/pytorch_model.bin"}},
        "checkpoint_path=",
    ),
    "timm without its name": (
        {"architecture": "hf-hub:evil/other", "pretrained_cfg": {}, "num_classes": 2},
        "the backbone 'timm/hf-hub:evil/other'",
    ),
    "a repository by timm": ({**WRAPPER, "architecture": "hf-hub:evil/other"}, "the backbone 'timm/hf-hub:evil/other'"),
    "a folder by timm": ({**WRAPPER, "architecture": "local-dir:{folder}/code"}, "the backbone 'timm/local-dir:"),
    "another backbone": ({"model_type": "detr", "backbone": "evil/code"}, "backbone='evil/code'"),
    "weights of another backbone": ({"model_type": "detr", "use_pretrained_backbone": True}, "use_pretrained_backbone"),
    "a size": ({**BERT, "hidden_size": 32768, "intermediate_size": 32768}, "bytes of parameters"),
    "a size by timm": ({**WRAPPER, "model_args": {"channels": [4096] * 4}}, "bytes of parameters"),
    "layers without end": ({**BERT, "num_hidden_layers": 10**7}, "must not choose num_hidden_layers=10000000"),
    "stages without end": ({**BERT, "x": {"depths": [2, 10**7]}}, "must not choose depths=[2, 10000000]"),
    "deep JSON": ({**BERT, "x": json.loads("[" * 100 + "]" * 100)}, "levels of nested JSON"),
    "no object": ([BERT], "must be a JSON object, got list"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_repository_that_a_file_names_chooses_no_more_than_the_file(traps: Traps, case: str) -> None:
    config, expected = CONFIGS[case]
    name = _repository(traps, "chooses", {"config.json": config})
    with little_memory():
        (line,) = traps.run("merge", traps.says(backbone={"name": name})).stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    traps.assert_quiet()


@pytest.mark.parametrize(
    "config",
    [
        {
            "num_hidden_layers": 126,
            "n_layer": 0,
            "depths": [2, 2, 18, 2],
            "no_rope_layers": [1, 0] * 40,
            "mlp_layers": [],
        },
        {"attn_implementation": "sdpa", "_name_or_path": "google/bert", "id2label": {"0": "a/b"}},
        {"quantization_config": {"load_in_8bit": True}, "auto_map": {"AutoConfig": "x.Y"}, "backbone": None},
        {"model_type": "timm_wrapper", "architecture": "resnet50.a1_in1k", "pretrained_cfg": {"url": "https://x/y"}},
    ],
)
def test_honest_repositories_may_be_named(config: dict[str, Any]) -> None:
    assert model_objections(config) == []


def test_an_image_processor_of_a_repository_that_a_file_names(traps: Traps) -> None:
    """It is read from the cache, and opens nothing else."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=16)  # fmt: skip
    model, folder, side = transformers.ViTForImageClassification(config).eval(), traps.folder / "vit", 32
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    _cached(folder, "good/vit", traps.folder / "cache")
    visadapt.inject(model, m=2, task="plain", labels=("a", "b"), num_classes=2)
    file = visadapt.save(model, "plain", traps.folder / "vit.visadapt", notes={
        "backbone": {"name": "hf/good/vit", "build": {"image_size": side}}})  # fmt: skip
    opened = visadapt.open(file)
    assert isinstance(visadapt.preprocess(opened).inputs, ProcessorInputs)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    stored = traps.folder / "cache" / "models--good--vit" / "snapshots" / ("0" * 40) / "preprocessor_config.json"
    stored.write_text(json.dumps({**config, "repo_path": str(traps.folder), "class_info_file": "x.json"}))
    with pytest.raises(VisadaptError, match=r"preprocessor_config.json of 'hf/good/vit' must not choose repo_path="):
        visadapt.preprocess(visadapt.open(file))
    traps.assert_quiet()


@pytest.mark.parametrize("command", [*COMMANDS, "summary"])
def test_what_never_ends_is_not_read(traps: Traps, command: str) -> None:
    for place in (traps.folder / "pipe.visadapt", traps.folder / "endless.visadapt"):
        os.mkfifo(place) if place.stem == "pipe" else place.symlink_to("/dev/zero")
        result = traps.run(command, place)
        kind = "pipe" if place.stem == "pipe" else "device"
        assert f"error: path must be a task file, got the {kind} {place}" in result.stderr
        place.unlink()
    os.mkfifo(traps.folder / "pipe.png")
    with pytest.raises(VisadaptError, match=r"pipe\.png must be a file, got a pipe"):
        read_images([traps.folder / "pipe.png"], 8)


def test_summary_shows_what_a_file_asks_for_and_does_none_of_it(traps: Traps) -> None:
    for name, build, _ in HOSTILE.values():
        name, build = (_filled(each, {"folder": traps.folder, "port": traps.port}) for each in (name, build))
        shown = traps.run("summary", traps.says(backbone={"name": name, "build": build}), code=0).stdout
        assert name in shown
    traps.assert_quiet()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torch.hub leaves its connection open
def test_the_traps_are_sharp(traps: Traps) -> None:
    """By the user's own hand the same code runs, and the same address is asked."""
    file = traps.says(backbone={"name": "hf/evil/code"})
    by_hand = ("--backbone", f"hf/{traps.folder / 'code'}", "--build", "trust_remote_code=true")
    traps.run("predict", file, *by_hand)
    assert traps.marker.exists()
    traps.marker.unlink()
    overlay = json.dumps({"url": f"http://127.0.0.1:{traps.port}/w.pth", "hf_hub_id": None})
    traps.run("predict", traps.says(backbone={"name": "timm/resnet18"}), "--build", f"pretrained_cfg_overlay={overlay}")
    assert traps.requests == ["/w.pth"]
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.load(traps.folder / "pickle" / "pytorch_model.bin", weights_only=False)
    assert traps.marker.exists()


def test_an_option_given_by_hand_replaces_the_files(traps: Traps) -> None:
    file = traps.says(backbone={"name": "timm/resnet18", "build": {**SMALL, "checkpoint_path": "/etc/passwd"}})
    traps.run("merge", file)
    given = ("--build", "checkpoint_path=", "--build", f"channels={SMALL['channels']}")
    assert "cannot be merged" in traps.run("merge", file, *given).stderr


@pytest.mark.parametrize(
    ("name", "build", "expected"),
    [
        ("timm/vit_tiny_patch16_224", {"pretrained": False, "depth": 64, "embed_dim": 6144}, "bytes of parameters"),
        ("timm/resnet18", {"pretrained": False, "channels": [65536] * 4}, "bytes of parameters"),
        ("timm/vit_tiny_patch16_224", {"pretrained": False, "num_heads": 5}, "cannot be built with num_heads=5"),
        ("torchvision/vit_b_16", {"weights": None, "image_size": 8192, "num_classes": 65536}, "bytes of parameters"),
        ("bundled/minilm", {"max_position_embeddings": 65536, "num_hidden_layers": 256}, "bytes of parameters"),
    ],
)  # fmt: skip
def test_a_backbone_that_a_file_makes_too_large_is_never_built(
    traps: Traps, name: str, build: dict[str, Any], expected: str
) -> None:
    file = traps.says(backbone={"name": name, "build": build})
    with little_memory():
        (line,) = traps.run("merge", file).stderr.strip().splitlines()
    assert name in line
    assert expected in line
    traps.assert_quiet()


def test_a_file_chooses_no_more_blocks_than_networks_have() -> None:
    assert objections("timm/resnet18", {"layers": [3, 44, 87, 4], "pretrained": False}) == []
    (said,) = objections("timm/resnet18", {"layers": [256] * 4})
    assert said.endswith("(layers must be an integer from 1 to 256, or a list of up to 16 of them, 256 in total)")
    assert len(objections("hf/bert", {"num_hidden_layers": 257})) == 1


INPUTS = {
    "size that is a flag": ({"kind": "images", "size": True}, "size must be int, got True"),
    "size that is a text": ({"kind": "images", "size": "32"}, "size must be int, got '32'"),
    "size that takes all memory": ({"kind": "images", "size": 10**6}, "size must be an integer from 1 to 8192"),
    "mean of two": ({"kind": "images", "size": 8, "mean": [0.5, 0.5]}, "mean must be three finite numbers"),
    "mean without end": ({"kind": "images", "size": 8, "mean": [0, 0, float("inf")]}, "mean must be three finite"),
    "std of texts": ({"kind": "images", "size": 8, "std": ["1", "1", "1"]}, "std must be tuple"),
    "std of zero": ({"kind": "images", "size": 8, "std": [0, 1, 1]}, "std must be three positive numbers"),
    "length that is a flag": ({"kind": "texts", "tokenizer": "bundled/minilm", "length": True}, "length must be int"),
    "endless length": ({"kind": "texts", "tokenizer": "bundled/minilm", "length": 10**9}, "length must be an integer"),
    "pairs that are a number": ({"kind": "texts", "tokenizer": "bundled/minilm", "pairs": 1}, "pairs must be bool"),
    "a loader": ({"kind": "texts", "tokenizer": "bundled/minilm", "loader": "os.system"}, "loader is not part of it"),
    "an option of the tokenizer": (
        {"kind": "texts", "tokenizer": "bundled/minilm", "trust_remote_code": True},
        "trust_remote_code",
    ),
    "a tokenizer's folder": ({"kind": "texts", "tokenizer": "hf/{folder}/code"}, "the tokenizer 'hf/{folder}/code'"),
    "a tokenizer beside": ({"kind": "texts", "tokenizer": "hf/relative"}, "the tokenizer 'hf/relative'"),
    "a tokenizer without place": ({"kind": "texts", "tokenizer": "{folder}/code"}, "the tokenizer '{folder}/code'"),
    "a list": ([], "a description of inputs must have a kind"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_inputs_of_a_file_are_typed_and_bounded(traps: Traps, command: str) -> None:
    for case, (inputs, expected) in INPUTS.items():
        inputs, expected = (_filled(each, {"folder": traps.folder, "port": traps.port}) for each in (inputs, expected))
        file = traps.says(backbone={"name": "timm/resnet18", "build": SMALL}, inputs=inputs)
        result = traps.run(command, file)
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: "), case
        assert expected in line, case
        traps.assert_quiet()


@pytest.mark.parametrize("problem", ["ranking", [], {"a": 1}, 3])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_kind_of_output_that_a_file_notes_is_checked(traps: Traps, command: str, problem: Any) -> None:
    inputs = {"kind": "texts", "tokenizer": "bundled/minilm", "length": 8}
    file = traps.says(backbone={"name": "timm/resnet18", "build": SMALL}, inputs=inputs, problem_type=problem)
    (line,) = traps.run(command, file).stderr.strip().splitlines()
    assert line.startswith("error: task 'plain': problem_type must be one of single_label_classification, ")


def test_a_tokenizer_that_a_file_names_runs_no_code(traps: Traps) -> None:
    inputs = {"kind": "texts", "tokenizer": "hf/evil/code", "length": 8}
    result = traps.run("predict", traps.says(backbone={"name": "timm/resnet18", "build": SMALL}, inputs=inputs))
    assert "transformers cannot load the tokenizer" in result.stderr
    traps.assert_quiet()


def test_a_tokenizer_by_hand(traps: Traps) -> None:
    by_hand = f"hf/{traps.folder / 'code'}"
    moved = {"kind": "texts", "tokenizer": "hf//moved/away", "length": 8}
    assert from_description(moved, backbone=by_hand) == TextInputs(by_hand, 8)
    assert from_description({**moved, "tokenizer": "bundled/minilm"}, backbone=by_hand).tokenizer == "bundled/minilm"  # type: ignore[union-attr]


UNCACHED = ("timm/resnet18.a1_in1k", "timm/resnet18", "torchvision/resnet18", "hf/google-bert/bert-base-uncased")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", UNCACHED)
def test_a_name_in_a_file_does_not_reach_the_network(traps: Traps, command: str, name: str) -> None:
    result = traps.run(command, traps.says(backbone={"name": name}))
    (line,) = result.stderr.strip().splitlines()
    assert f"of {name!r}, which a file names, must be on this machine: --online downloads them" in line
    assert "--backbone NAME" in line
    traps.assert_quiet()


def test_the_network_by_hand(traps: Traps) -> None:
    file = traps.says(backbone={"name": "torchvision/squeezenet1_1"})
    assert "cannot load 'torchvision/squeezenet1_1'" in traps.run("predict", file, "--online").stderr
    assert "download.pytorch.org" in traps.reached
    traps.reached.clear()
    traps.run("predict", file, "--backbone", "torchvision/squeezenet1_1")
    assert "download.pytorch.org" in traps.reached


def test_weights_that_are_on_this_machine_need_no_network(traps: Traps) -> None:
    import timm
    import torchvision

    saved = timm.create_model("resnet10t")
    save_file(saved.state_dict(), traps.folder / "model.safetensors")
    (traps.folder / "timm").mkdir()
    shutil.move(traps.folder / "model.safetensors", traps.folder / "timm")
    _cached(traps.folder / "timm", "timm/resnet10t.c3_in1k", traps.folder / "cache")
    checkpoints = traps.folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    squeezed = torchvision.models.squeezenet1_1()
    torch.save(squeezed.state_dict(), checkpoints / Path(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url).name)
    bert = ZOO["transformers/bert"].make()
    bert.save_pretrained(traps.folder / "bert")
    _cached(traps.folder / "bert", "good/bert", traps.folder / "cache")
    for name, expected in (
        ("timm/resnet10t.c3_in1k", saved),
        ("torchvision/squeezenet1_1", squeezed),
        ("hf/good/bert", bert),
    ):
        source, options = vetted("a file", name, {})
        found = resolve(source, **options).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())
    traps.assert_quiet()


def test_a_task_of_a_cached_backbone_needs_nothing_by_hand(traps: Traps) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_path()))
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(traps.folder / "bert")
    tokenizer.save_pretrained(traps.folder / "bert")
    _cached(traps.folder / "bert", "good/bert", traps.folder / "cache")
    visadapt.inject(model, m=2, task="plain", labels=("a", "b"), num_classes=2)
    inputs = {"kind": "texts", "tokenizer": "hf/good/bert", "length": 8}
    for notes in ({"inputs": inputs}, {}):
        notes = {"backbone": {"name": "hf/good/bert", "build": {"num_labels": 2}}, **notes}
        file = visadapt.save(model, "plain", traps.folder / "bert.visadapt", notes=notes)
        (answer,) = traps.run("predict", file, code=0).stdout.strip().splitlines()
        assert json.loads(answer)["input"] == "a line"
    traps.assert_quiet()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("timm/vit_tiny_patch16_224.augreg_in21k", {"img_size": [64, 32], "depth": 2, "drop_path_rate": 0.1}),
        ("timm/resnet18", {"pretrained": False, "in_chans": 3, "num_classes": 0, "global_pool": "avg"}),
        ("torchvision/vit_b_16", {"weights": None, "image_size": 64, "num_classes": 3}),
        ("torchvision/resnet50", {"weights": "IMAGENET1K_V1"}),
        ("torchvision/resnet50", {"weights": "ResNet50_Weights.DEFAULT"}),
        ("hf/bert-base-uncased", {"num_labels": 5, "hidden_dropout_prob": 0, "revision": "0a1b"}),
        ("hf/distilbert/distilbert-base-uncased", {}),
        ("bundled/minilm", {"num_labels": 3}),
        ("bundled/resnet50", {}),
    ],
)
def test_honest_files_may_ask_for_their_architecture(name: str, build: dict[str, Any]) -> None:
    assert objections(name, build) == []


def test_no_option_of_the_allowlist_takes_a_path_an_address_or_code() -> None:
    for options in OPTIONS.values():
        for key, kind in options.items():
            for value in ("/etc/passwd", "http://x/y", "a/b", "..", {"url": "x"}, [["x"]], "os:system"):
                assert not kind.holds(value), key


LITTLE = ("--size", "16", "--epochs", "1", "--method", "Linear", "--norms", "frozen", "--backbone", "timm/resnet18",
          "--build", "pretrained=false", "--build", "channels=[8,16,24,32]")  # fmt: skip


def _training(*more: str) -> Answer:
    return CliRunner().invoke(app, ["train", "photos", *LITTLE, *more])


def test_train_says_which_options_no_file_may_choose(traps: Traps) -> None:
    _photos(traps.folder / "photos")
    said = _training("--out", "a.visadapt")
    assert said.exit_code == 0
    assert "cannot set" not in said.stderr
    said = _training("--build", "block_args={}", "--out", "b.visadapt")
    assert said.exit_code == 0
    assert (
        "b.visadapt cannot set block_args={} by itself: give --backbone and --build again when using it" in said.stderr
    )
    asked = ["predict", "photos/test", "--task", "b.visadapt"]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 1
    assert "b.visadapt must not choose block_args={}" in refused.stderr
    assert CliRunner().invoke(app, [*asked, "--build", "block_args={}"]).exit_code == 0


def _photos(folder: Path) -> None:
    from PIL import Image

    digits = load_images("mnist")
    for split, part in (("train", digits.train), ("test", digits.test)):
        for label in (0, 1):
            (folder / split / str(label)).mkdir(parents=True)
            for i in (part.labels == label).nonzero().flatten()[:6].tolist():
                pixels = part.images[i].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / split / str(label) / f"{i}.png")


def test_a_checkpoint_chooses_nothing(traps: Traps) -> None:
    _photos(traps.folder / "photos")
    state = traps.folder / "state"
    state.write_bytes(pickle.dumps(_Evil(traps.marker)))
    resumes = ("--task", "a", "--checkpoint", str(state), "--out")
    refused = _training(*resumes, "a.visadapt")
    assert refused.exit_code == 1
    assert f"{state} is not a whole checkpoint of a training run" in refused.stderr
    state.unlink()
    state.symlink_to("/dev/zero")
    assert f"--checkpoint must be a file, got the device {state}" in _training(*resumes, "a.visadapt").stderr
    state.unlink()
    assert _training(*resumes, "a.visadapt").exit_code == 0
    content = read_described(state, "visadapt_training", "checkpoint")
    notes = content.description

    def rewrite(**changed: Any) -> None:
        write_described(state, "visadapt_training", {**notes, **changed}, content.tensors)

    hostile = {"optimizer": "x", "lr_lambdas": [{"__code__": "x"}], "step": "x", "base_lrs": "x"}
    rewrite(schedule={**notes["schedule"], **hostile})
    assert _training(*resumes, "b.visadapt").exit_code == 0
    first, second = load_file("a.visadapt"), load_file("b.visadapt")
    assert all(torch.equal(first[key], second[key]) for key in first)
    for changed in (
        {"schedule": {**notes["schedule"], "last_epoch": True}},
        {"schedule": {**notes["schedule"], "_last_lr": "x"}},
        {"schedule": {**notes["schedule"], "_last_lr": [0.1] * 9}},
        {"schedule": {}},
        {"run": {**notes["run"], "steps": "1"}},
        {"run": {**notes["run"], "__class__": "x"}},
        {"run": {**notes["run"], "epochs": ["x"]}},
        {"identity": 3},
    ):
        rewrite(**changed)
        refused = _training(*resumes, "c.visadapt")
        assert refused.exit_code == 1
        assert f"{state} is not a whole checkpoint of a training run" in refused.stderr
    traps.assert_quiet()


RESULT = Result("k0", "compare", "image", "net", "data", "who", 0, "test", "accuracy", 0.5, 1, 1, 9, 1.0, 9, 0.1, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"score": "1"},
        {"score": float("nan")},
        {"seed": True},
        {"seed": -1},
        {"backbone": 0},
        {"lr": float("inf")},
        {"facts": "x"},
        {"facts": {"a": "\x1b[2J"}},
        {"experiment": "transfer"},
        {"experiment": "ablation", "facts": {"first": "0", "last": 1, "norms": "kept"}},
        {"machine": {"a": 1}},
        {"machine": {"\x9b31m": "x"}},
        {"contender": "a\nb"},
        {"problem": "\u202egnp.x"},
        {"network": "x" * 2000},
        {"experiment": ["x"]},
        {"__class__": "x"},
    ],
)
def test_results_are_typed(traps: Traps, changed: dict[str, Any]) -> None:
    folder = traps.folder / "results"
    write(RESULT, folder)
    evil = folder / "compare" / "evil.json"
    evil.write_text(json.dumps({**dataclasses.asdict(RESULT), **changed}), encoding="utf-8")
    experiment = ("experiment", "compare", "--problem", "bundled/minilm:tweets", "--results", str(folder))
    for command in (("report", str(folder), "--out", str(traps.folder / "page")), experiment):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1, repr(result.exception)
        assert f"error: {evil} is not a result of an experiment" in result.stderr
    assert not (traps.folder / "page.md").exists()
    traps.assert_quiet()


def test_names_of_results_are_no_markup_on_pages(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> [a](javascript:x) $\\frac$ |"
    rows = [
        dataclasses.replace(
            RESULT, key=f"k{i}", contender=f"{name} {i % 2}", problem=name, seed=i // 2, trained=1 + i % 2
        )
        for i in range(4)
    ]
    for row in rows:
        write(row, tmp_path / "results")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "results"), "--out", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    page, text = ((tmp_path / f"page{suffix}").read_text() for suffix in (".html", ".md"))
    assert "<img src=x" not in page + text
    assert "&lt;img src=x" in page
    assert "](javascript:" not in text.replace("\\](javascript:", "")


@pytest.mark.parametrize("name", ["../../evil", "/evil", "", ".evil"])
def test_a_result_is_written_nowhere_else(tmp_path: Path, name: str) -> None:
    for field in ("key", "experiment"):
        with pytest.raises(VisadaptError, match="experiment and key must be plain names"):
            write(dataclasses.replace(RESULT, **{field: name}), tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_no_files_of_visadapt(traps: Traps, plain: Path) -> None:
    evil = traps.folder / "evil.visadapt"
    evil.write_bytes(pickle.dumps(_Evil(traps.marker)))
    for command in (*COMMANDS, "summary"):
        assert "evil.visadapt is not a whole task file" in traps.run(command, evil).stderr
    model = ZOO["tiny/resnet"].make()
    visadapt.inject(model, m=2, task="a")
    with pytest.raises(VisadaptError, match=r"is not a (whole )?decider"):
        visadapt.load_decider(model, evil)
    (traps.folder / "results").mkdir()
    shutil.copy(evil, traps.folder / "results" / "evil.json")
    shutil.copy(evil, traps.folder / "results.csv")
    for place in ("results", "results.csv"):
        refused = CliRunner().invoke(app, ["report", place, "--out", "page"])
        assert refused.exit_code == 1
        assert "error: " in refused.stderr
    traps.assert_quiet()


@pytest.mark.parametrize(
    "changed",
    [{"tasks": "ab"}, {"tasks": [1, 2]}, {"backbone": {"x": "y"}}, {"backbone": {"x": ["y"]}}, {"tasks": None}],
)
def test_a_deciders_description_is_typed(tmp_path: Path, changed: dict[str, Any]) -> None:
    model = ZOO["tiny/resnet"].make()
    for task in ("a", "b"):
        visadapt.inject(model, m=2, task=task, num_classes=2)
    batch = ZOO["tiny/resnet"].inputs()["x"]
    visadapt.fit_decider(model, {"a": [batch], "b": [batch + 1]})
    file = visadapt.save_decider(model, tmp_path / "decider")
    content = read_described(file, "visadapt_decider", "decider")
    write_described(file, "visadapt_decider", {**content.description, **changed}, content.tensors)
    with pytest.raises(VisadaptError, match=r"is not a (whole )?decider"):
        visadapt.load_decider(model, file)
