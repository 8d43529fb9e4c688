"""Model cards: what a repository of task files says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visadapt.backbone.modules import unwrapped
from visadapt.data.allowlist import objections
from visadapt.data.inputs import ImageInputs, TextInputs
from visadapt.opening.backbones import recorded_backbone
from visadapt.opening.preparing import preprocess
from visadapt.optional import require
from visadapt.runtime.measured import measured
from visadapt.runtime.parameters_of import named_parameters
from visadapt.runtime.registry import Task, facts_of, registry_of
from visadapt.task_file import read

_SHOWN = 100
"""Labels that a card lists."""


def model_card(
    model: nn.Module,
    files: Mapping[str, Path],
    repository: str,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
) -> str:
    """Write the card of a repository: method, size, backbone, labels, metrics and how to load it.

    Args:
        model: the injected model.
        files: the file of each task.
        repository: ``"user/repo"``.
        metrics: of a single task; None for those in its note ``metrics``.
        license: identifier, such as ``"apache-2.0"``.

    Returns:
        Markdown with metadata for the hub.
    """
    registry = registry_of(model)
    specs = [registry.task(name) for name in files]
    sections = [_section(model, spec, files[spec.name], metrics) for spec in specs]
    return "\n".join(
        [
            "---",
            _metadata(model, specs, license).to_yaml(),
            "---",
            "",
            f"# {_plain(repository.partition('/')[2])}",
            "",
            "Small residual adapters for one frozen network, made with visadapt: each file holds one task, and nothing "
            "of the network itself.",
            "",
            *sections,
            "## How to load",
            "",
            "```python",
            "import visadapt",
            "",
            f"model = visadapt.open({_source(model, specs[0], repository)})",
            f"print(visadapt.predict(model, {_example(model, specs[0])}, {specs[0].name!r}))",
            "```",
            "",
        ]
    )


def _metadata(model: nn.Module, specs: Sequence[Task], license: str | None) -> Any:
    hub = require("huggingface_hub", "a model card", "visadapt[hub]")
    kinds = {_kind(model, spec) for spec in specs} - {None}
    methods = {type(p.method).__name__.lower() for spec in specs for p in spec.placements}
    return hub.ModelCardData(
        library_name="visadapt",
        license=license,
        base_model=_base_model(model, specs[0]),
        pipeline_tag=kinds.pop() if len(kinds) == 1 else None,
        tags=["adapters", "parameter-efficient-fine-tuning", *sorted(methods)],
    )


def _inputs(model: nn.Module, spec: Task) -> ImageInputs | TextInputs | None:
    known = spec.inputs is not None or "inputs" in spec.notes
    return preprocess(model, spec.name).inputs if known else None


def _kind(model: nn.Module, spec: Task) -> str | None:
    inputs = _inputs(model, spec)
    return None if inputs is None else f"{'image' if isinstance(inputs, ImageInputs) else 'text'}-classification"


def _backbone(model: nn.Module, spec: Task) -> tuple[str, dict[str, Any]] | None:
    recorded = recorded_backbone(spec.notes)
    if recorded is not None:
        return recorded
    source = registry_of(model).source
    return None if source is None else (source.name, source.build)


def _base_model(model: nn.Module, spec: Task) -> str | None:
    """The repository of the backbone, where its name is one: transformers' models, and timm's with a tag."""
    backbone = _backbone(model, spec)
    place, _, name = ("", "", "") if backbone is None else backbone[0].partition("/")
    if place == "timm" and "." in name:
        return f"timm/{name}"
    return name if place == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _section(model: nn.Module, spec: Task, file: Path, metrics: Mapping[str, float] | None) -> str:
    size = sum(parameter.numel() for _, parameter in named_parameters(model, spec.name))
    backbone, labels, inputs = _backbone(model, spec), spec.labels or (), _inputs(model, spec)
    shown = ", ".join(labels[:_SHOWN]) + (f", … ({len(labels)})" if len(labels) > _SHOWN else "")
    scores = measured(spec.notes if metrics is None else {"metrics": metrics})
    rows = {
        "file": f"{file.name} ({file.stat().st_size / 1e6:.2f} MB)",
        "digest": read(file).digest,
        "method": " + ".join(str(placement.method) for placement in spec.placements),
        "norms": spec.norms,
        "size": f"{size:,} trained parameters, {size / facts_of(model).size:.2%} of the backbone",
        "backbone": type(unwrapped(model)).__name__ if backbone is None else backbone[0],
        "loaded with": ", ".join(f"{k}={v!r}" for k, v in backbone[1].items()) if backbone else "",
        "inputs": "" if inputs is None else _described(inputs),
        "labels": shown,
        "metrics": ", ".join(f"{name} {value}" for name, value in scores.items()),
    }
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items() if value]
    return "\n".join([f"## {spec.name}", "", "| | |", "|---|---|", *lines, ""])


def _described(inputs: ImageInputs | TextInputs) -> str:
    if isinstance(inputs, ImageInputs):
        return f"RGB images, {inputs.size} × {inputs.size} pixels"
    return f"{'pairs of texts' if inputs.pairs else 'texts'}, up to {inputs.length} tokens of {inputs.tokenizer}"


def _plain(text: Any) -> str:
    """Text without meaning to Markdown: what a label says is shown, not rendered."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", " ".join(str(text).split()))


def _source(model: nn.Module, spec: Task, repository: str) -> str:
    """The arguments of ``open``; what a file may not choose is named by hand."""
    backbone = _backbone(model, spec)
    name = repr(f"hub:{repository}")
    if backbone is None:
        return f"{name}, backbone=network"
    if objections(*backbone):
        return f"{name}, backbone={backbone[0]!r}, build={backbone[1]!r}"
    return name


def _example(model: nn.Module, spec: Task) -> str:
    kind = _kind(model, spec)
    return {"image-classification": "['photo.jpg']", "text-classification": "['a text']"}.get(str(kind), "inputs")
