"""Networks as files that run without this library: ONNX and torch.export programs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.arguments import takes
from visadapt.backbone.trace import guess_input, quiet
from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.optional import require
from visadapt.printable import shown
from visadapt.runtime.modes import keep_modes
from visadapt.runtime.selection import using

FORMATS = (".onnx", ".pt2")


@takes()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    example: Any = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write what a model computes to a file, for batches of any size and texts of any length.

    Args:
        model: an injected model, or a plain one (merged, say).
        path: ``….onnx``, or ``….pt2`` for ``torch.export.load``; an existing file is replaced.
        task: its name; None to export the model in its present state.
        example: an input, of which rank and dtype count: a tensor or a dict of keyword arguments; None to guess.
        labels: names of the classes, kept as JSON under ``labels``: in ONNX's metadata, or as an extra file.

    Returns:
        The path.

    Raises:
        VisadaptError: another suffix, no such task, no onnxscript, or a model that torch cannot export.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> path = export(model, "flowers.pt2", task="flowers", example=torch.randn(2, 3, 32, 32))
        >>> program = torch.export.load(path).module()
        >>> program(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 3])
    """
    target = Path(path)
    if target.suffix not in FORMATS:
        raise VisadaptError(f"{target} would be exported as {' or '.join(FORMATS)}, by its suffix")
    given = guess_input(model) if example is None else example
    named = dict(given) if isinstance(given, Mapping) else {}
    positional = () if named else (given,)
    shapes = {name: _free(value, model) for name, value in named.items()} if named else (_free(given, model),)
    try:
        with using(model, task) if task is not None else nullcontext(), keep_modes(model), quiet():
            model.eval()
            program = torch.export.export(model, positional, named, dynamic_shapes=shapes, strict=False)
    except VisadaptError:
        raise
    except Exception as error:
        raise VisadaptError(f"torch cannot export this {type(model).__name__}: {error}") from error
    kept = {} if labels is None else {"labels": json.dumps(list(labels))}
    with replacing(target) as partial:
        if target.suffix == ".pt2":
            with _Sink(partial, "wb") as sink:
                torch.export.save(program, sink, extra_files=kept)  # type: ignore[arg-type]
            if sink.error is not None:
                raise sink.error
        else:
            _onnx(program, partial, kept)
    return target


def _free(value: Tensor, model: nn.Module) -> dict[int, Any]:
    """Which dimensions of an input may vary: the batch, and of tokens the length."""
    if not isinstance(value, Tensor) or not value.ndim:
        raise VisadaptError(f"example must be a batch, or a dict of the model's keywords, got {shown(value, 80)}")
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if value.ndim == 2 and not value.is_floating_point():
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        free[1] = torch.export.Dim("length", max=longest)
    return free


class _Sink(io.FileIO):
    """A file that stores its first error for later: torch's writer aborts the process if a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        rest = view
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return view.nbytes


def _onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    require("onnxscript", "ONNX", "visadapt[export]")
    with quiet():  # its warnings are about its own parts
        made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["logits"])
    assert made is not None
    made.model.metadata_props.update(metadata)
    made.save(path)
