"""Write the files that every later version must read: ``python -m tests.files.write --folder v2``.

The files in ``v1`` were written once, by the code of commit b95e958 (0.1.0), and stay as they are: files that a later
version wrote would only show that it agrees with itself. A new file format gets a new folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import visadapt
from tests.files.backbones import BACKBONES, answer
from tests.files.cases import CASES, Case, put
from tests.files.runs import cache, decider_inputs, train
from visadapt.training import Fit

HERE = Path(__file__).parent


def description(model: nn.Module, task: str, case: Case) -> dict[str, Any]:
    """Return what a loaded task must say of itself, as JSON values."""
    spec = visadapt.tasks(model)[task]
    return {
        "backbone": case.backbone,
        "dtype": str(case.dtype).removeprefix("torch."),
        "norms": spec.norms,
        "head": spec.head,
        "num_classes": spec.num_classes,
        "labels": spec.labels,
        "notes": {**spec.notes, **case.notes},
        "placements": [
            {"method": type(p.method).__name__, "options": dataclasses.asdict(p.method), "sites": p.sites}
            for p in spec.placements
        ],
    }


def write_tasks(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a task file per case; return what each must say of itself, and all outputs."""
    manifest: dict[str, Any] = {}
    outputs = {f"backbone {name}": answer(backbone.make(), backbone.inputs()) for name, backbone in BACKBONES.items()}
    for task, case in CASES.items():
        backbone = BACKBONES[case.backbone]
        model = backbone.make(case.dtype)
        for method in case.methods:
            if isinstance(method, visadapt.Parallel) and method.factor_of is not None:
                put(model, method.factor_of, CASES[method.factor_of])
        put(model, task, case)
        visadapt.save(model, task, folder / f"{task}.visadapt", notes=case.notes)
        manifest[task] = description(model, task, case)
        outputs[task] = answer(model, backbone.inputs())
    return manifest, outputs


def loaded(folder: Path, *tasks: str) -> nn.Module:
    """Return the small ResNet with these tasks of the folder."""
    model = BACKBONES["resnet"].make()
    for task in tasks:
        visadapt.load(model, folder / f"{task}.visadapt")
    return model


def write_decider(folder: Path) -> None:
    """Write a decider between two of the tasks."""
    model = loaded(folder, *decider_inputs())
    visadapt.fit_decider(model, {task: [x] for task, x in decider_inputs().items()})
    visadapt.save_decider(model, folder / "decider.safetensors")


class StoppedError(Exception):
    """Ends a training run early."""


def stop(history: Fit) -> None:
    """End a training run after its second epoch."""
    if len(history.epochs) == 2:
        raise StoppedError


def write_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint of a run that was stopped half way; return the outputs and losses of a whole one."""
    with contextlib.suppress(StoppedError):
        train(loaded(folder, "bottleneck"), checkpoint=folder / "training.checkpoint", log=stop)
    model = loaded(folder, "bottleneck")
    _, losses = train(model)
    return {"training": answer(model, BACKBONES["resnet"].inputs()), "training losses": torch.tensor(losses)}


def write(folder: Path) -> None:
    """Write all files into a new folder."""
    folder.mkdir()
    manifest, outputs = write_tasks(folder)
    write_decider(folder)
    outputs |= write_checkpoint(folder)
    outputs["prefix"] = cache(loaded(folder, "bottleneck-late"), folder / "prefix.cache").features.clone()
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(f"{text}\n", encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, folder / "outputs.safetensors")


def main() -> None:
    """Write a folder, an existing one only if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="v1", help="a name beside this script, or a path; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="delete what the folder holds")
    options = parser.parse_args()
    folder = HERE / options.folder
    if folder.exists() and not options.overwrite:
        parser.error(f"{folder} exists, and old files must stay what they are: give another --folder")
    if folder.exists():
        shutil.rmtree(folder)
    write(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:8,}  {path.name}")


if __name__ == "__main__":
    main()
