"""Folders of task files of a tiny network of images, and of one of texts."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import nn

import visadapt
from tests.models import stir
from visadapt.data import minilm_path
from visadapt.data.hub import resolve

CHANNELS = [8, 16, 24, 32]
BUILD = {"pretrained": False, "channels": CHANNELS, "num_classes": 10}
NOTES = {
    "backbone": {"name": "timm/resnet18", "build": BUILD},
    "inputs": {"kind": "images", "size": 32},
}
CLASSES = {"flowers": 3, "birds": 5, "cars": 2, "maps": 3}
LABELS = ("iris", "lily", "rose", "tulip", "aster")


def network() -> nn.Module:
    """The backbone that the files name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve("timm/resnet18", **BUILD).eval()


def write_task(folder: Path, name: str, seed: int = 0, classes: int = 3, model: nn.Module | None = None) -> Path:
    """Write a task file that is another one for each seed."""
    model = network() if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms = ("affine", "frozen", "full")[seed % 3]
        visadapt.inject(model, m=4, task=name, num_classes=classes, labels=LABELS[:classes], norms=norms)
        stir(model, name, seed)
    path = visadapt.save(model, name, folder / f"{name}.visadapt", notes=NOTES)
    visadapt.remove(model, name)
    return path


def write_text_task(folder: Path, bert: Path, name: str, seed: int = 0, pairs: bool = False) -> Path:
    """Write a task file of the tiny BERT in a folder."""
    model = resolve(f"hf/{bert}").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        visadapt.inject(model, m=2, task=name, num_classes=2, labels=["bad", "good"])
        stir(model, name, seed)
    inputs = {"kind": "texts", "tokenizer": "bundled/minilm", "length": 16, "pairs": pairs}
    return visadapt.save(model, name, folder / f"{name}.visadapt", notes={"inputs": inputs})


def png(seed: int = 0, size: tuple[int, int] = (40, 36)) -> bytes:
    """An image file of noise."""
    image = Image.frombytes("RGB", size, Random(seed).randbytes(3 * size[0] * size[1]))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@torch.no_grad()
def alone(path: Path, data: bytes) -> torch.Tensor:
    """The logits of one image by one task in a fresh network."""
    model = network()
    name = visadapt.load(model, path)
    inputs = visadapt.data.inputs.from_description(visadapt.tasks(model)[name].notes["inputs"])
    batch = inputs(inputs.read([Image.open(io.BytesIO(data))]))
    logits: torch.Tensor = model(batch)[0]
    return logits


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, not to be changed."""
    folder = tmp_path_factory.mktemp("tasks")
    model = network()
    for seed, (name, classes) in enumerate(CLASSES.items()):
        write_task(folder, name, seed, classes, model)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    place = tmp_path / "tasks"
    place.mkdir()
    for path in written.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_path()))
        config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
