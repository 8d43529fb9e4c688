"""Files of old versions load and answer as before, for good: those in ``tests/files/v1`` never change.

``tests/files/write.py`` is how they were written. A failure here means that users' files or programs break: fix the
code, not the files.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import visadapt
from tests.files.backbones import BACKBONES, answer
from tests.files.runs import cache, decider_inputs, train
from visadapt.task_file import contents

FOLDER = Path(__file__).parent / "files" / "v1"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
OUTPUTS = load_file(FOLDER / "outputs.safetensors")
TENSORS = {task: load_file(FOLDER / f"{task}.visadapt") for task in MANIFEST}

METHODS = (
    "Bottleneck", "Parallel", "Series", "TSA", "DAN", "ConvAdapter", "SSF", "LoRA", "AdaptFormer", "Linear", "Norms",
    "Biases", "TopLayers", "Full",
)  # fmt: skip
PUBLIC = {
    "visadapt": (
        *METHODS, "METHODS", "Method", "Site", "Sites", "VisadaptError", "activate", "active", "cache_prefix",
        "decide", "eject", "fit_decider", "fold", "inject", "lean", "load", "load_decider", "merge", "merge_error",
        "named_parameters", "parameters", "remove", "save", "save_decider", "set_alpha", "sites", "split", "summary",
        "tasks", "trainable", "unlean", "unmerge", "using",
    ),
    "visadapt.training": (
        "Diverged", "Epoch", "Fit", "JsonLines", "METRICS", "RECIPES", "Recipe", "SCHEDULES", "Samples", "TensorBoard",
        "evaluate", "fit", "predict", "ready", "tokenised", "trimmed",
    ),
    "visadapt.data": (
        "ImageSet", "ImageSplit", "TextSet", "TextSplit", "augment", "dequantise", "image_files", "load_images",
        "load_squares", "load_text", "minilm_path", "normalize", "path", "read_images", "renumbered", "resnet50",
        "tokenizer_of",
    ),
    "visadapt.report": (
        "Claim", "Drawing", "Look", "Report", "Section", "build", "markdown", "page", "plot", "sweep_table", "table",
        "write",
    ),
    "visadapt.experiments": (
        "Ablation", "Compare", "Contender", "Decathlon", "Experiment", "ImageProblem", "InitScale", "Modality",
        "Problem", "Result", "Sequence", "TextProblem", "Tradeoff", "Transfer", "contender", "problem",
        "read_results", "run_experiment", "write_csv",
    ),
}  # fmt: skip


def test_every_method_has_a_file_and_every_file_is_there() -> None:
    covered = {placement["method"] for entry in MANIFEST.values() for placement in entry["placements"]}
    assert covered == set(METHODS)
    assert set(visadapt.METHODS) >= covered
    assert {path.stem for path in FOLDER.glob("*.visadapt")} == set(MANIFEST)


@pytest.mark.parametrize("room", PUBLIC)
def test_public_names_are_still_exported(room: str) -> None:
    found = {name: getattr(importlib.import_module(room), name, None) for name in PUBLIC[room]}
    # a module of the same name, which Python puts there when it is imported, would not do
    assert [name for name, value in found.items() if value is None or isinstance(value, ModuleType)] == []
    exported = getattr(importlib.import_module(room), "__all__", PUBLIC[room])
    assert set(exported) >= set(PUBLIC[room])


def assert_close(found: Tensor, expected: Tensor, *dtypes: torch.dtype) -> None:
    """Compare outputs at the precision of the coarsest dtype in which they were computed, relative to the largest.

    Not bit for bit: which kernel computes a convolution depends on the processor and on torch's version, and so does
    the order in which products are added up.
    """
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
    tolerance = max(1e-5, 4 * eps)
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (key, found[key].dtype, found[key].shape) == (key, tensor.dtype, tensor.shape)
        # as bytes: -0 is not 0, and NaN is NaN
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (found[key], tensor))), key


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_are_what_they_were(name: str) -> None:
    """If this fails, the fault is not visadapt's: a library computes one of its networks in another way."""
    backbone = BACKBONES[name]
    assert_close(answer(backbone.make(), backbone.inputs()), OUTPUTS[f"backbone {name}"])


def loaded(task: str, path: Path | None = None) -> nn.Module:
    """Return the backbone of a file with the file's task."""
    entry = MANIFEST[task]
    model = BACKBONES[entry["backbone"]].make(getattr(torch, entry["dtype"]))
    assert visadapt.load(model, path or FOLDER / f"{task}.visadapt") == task
    return model


@pytest.mark.parametrize("task", MANIFEST)
def test_a_task_file_is_what_it_was(task: str, tmp_path: Path) -> None:
    entry, tensors = MANIFEST[task], TENSORS[task]
    inputs = BACKBONES[entry["backbone"]].inputs()
    model = loaded(task)
    found = answer(model, inputs)
    assert_close(found, OUTPUTS[task], getattr(torch, entry["dtype"]), *(t.dtype for t in tensors.values()))

    spec = visadapt.tasks(model)[task]
    labels = None if spec.labels is None else list(spec.labels)
    assert [spec.norms, spec.head, spec.num_classes, labels, spec.notes] == [
        entry[key] for key in ("norms", "head", "num_classes", "labels", "notes")
    ]
    for placement, expected in zip(spec.placements, entry["placements"], strict=True):
        assert type(placement.method) is visadapt.METHODS[expected["method"]]
        assert vars(placement.method) | expected["options"] == vars(placement.method)
        assert list(placement.sites) == expected["sites"]

    shown = str(contents(FOLDER / f"{task}.visadapt"))
    for word in (task, *(p["method"] for p in entry["placements"]), *(entry["labels"] or ()), *entry["notes"]):
        assert word in shown

    again = visadapt.save(model, task, tmp_path / "again.visadapt")
    assert_same_bytes(load_file(again), tensors)
    assert torch.equal(answer(loaded(task, again), inputs), found)


def test_a_decider_decides_as_before(tmp_path: Path) -> None:
    model = BACKBONES["resnet"].make()
    for task in decider_inputs():
        visadapt.load(model, FOLDER / f"{task}.visadapt")
    visadapt.load_decider(model, FOLDER / "decider.safetensors")
    for task, x in decider_inputs().items():
        assert visadapt.decide(model, x) == [task] * len(x)
    again = visadapt.save_decider(model, tmp_path / "again.safetensors")
    assert_same_bytes(load_file(again), load_file(FOLDER / "decider.safetensors"))


def test_a_training_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    path = Path(shutil.copy(FOLDER / "training.checkpoint", tmp_path))
    model = loaded("bottleneck")
    logged: list[int] = []
    _, losses = train(model, checkpoint=path, log=lambda history: logged.append(len(history.epochs)))
    assert logged == [3, 4]
    # rounding errors go through all steps
    torch.testing.assert_close(torch.tensor(losses), OUTPUTS["training losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(answer(model, BACKBONES["resnet"].inputs()), OUTPUTS["training"], rtol=1e-4, atol=1e-4)


def test_a_prefix_cache_does_no_harm(tmp_path: Path) -> None:
    """It is used or made anew; either way the features are right."""
    for name in ("prefix.cache", "prefix.cache.key"):
        shutil.copy(FOLDER / name, tmp_path)
    found = cache(loaded("bottleneck-late"), tmp_path / "prefix.cache")
    assert_close(found.features, OUTPUTS["prefix"])
    found.prefix.close()
