"""Raw inputs of a task (images, paths, texts) as what its model takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from visadapt.arguments import reading, takes
from visadapt.data.file_requests import image_processor
from visadapt.data.inputs import ImageInputs, Inputs, TextInputs, described, from_description, inputs_of
from visadapt.data.processors import processor_of
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import registry_of


@dataclass(frozen=True)
class Preprocess:
    """Prepares raw inputs as a task's file describes it.

    Attributes:
        inputs: the description: size, mean and standard deviation of images, or tokenizer and length of texts.
    """

    inputs: Inputs

    def __call__(self, raw: Any) -> Tensor | dict[str, Tensor]:
        """Prepare one input or several as a batch on the CPU.

        Args:
            raw: images of Pillow and paths of images, or texts; one of them or a list of them. A pair of texts is a
                tuple, or one text with a tab between the two.

        Returns:
            Images ``(N, 3, size, size)`` in float32, or the arguments of a text model, ``(N, L)`` each.

        Raises:
            VisadaptError: an input cannot be read, or is of another kind than the task takes.
        """
        several = listed(raw)
        if not several:
            raise VisadaptError("inputs must have at least one image or text, got none")
        if isinstance(self.inputs, TextInputs):
            forms = (str, tuple) if self.inputs.pairs else (str,)
            other = next((each for each in several if not isinstance(each, forms)), None)
            if other is not None:
                raise VisadaptError(f"inputs of this task must be texts, got {type(other).__name__}")
            return self.inputs(self.inputs.read(several))
        return self.inputs(self.inputs.read(several))


def listed(raw: Any) -> list[Any]:
    """The inputs as a list; one image, path or text is a list of one."""
    if isinstance(raw, str | os.PathLike) or not isinstance(raw, Iterable):
        return [raw]
    with reading("inputs"):
        return list(raw)


@takes()
def preprocess(
    model: nn.Module, task: str | None = None, *, backbone: str | None = None, online: bool = False
) -> Preprocess:
    """Return a callable that prepares images or texts for a task, as its file describes it.

    Args:
        model: an injected model, such as `visadapt.open` returns.
        task: name of the task; None for the active one.
        backbone: name of the backbone by the caller's own hand, such as ``"hf/bert-base-uncased"``: its tokenizer is
            used where the task does not record one.
        online: whether a tokenizer that only the task's file names may be downloaded.

    Returns:
        The callable: images of Pillow, paths or texts → a batch that the model takes, on the CPU.

    Raises:
        VisadaptError: the model has no such task, or it is not known how its inputs are prepared.

    Examples:
        >>> from PIL import Image
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> prepare = visadapt.preprocess(model, "flowers")
        >>> prepare([Image.new("RGB", (300, 200)), Image.new("L", (50, 80))]).shape
        torch.Size([2, 3, 224, 224])
    """
    registry = registry_of(model)
    spec = registry.task(registry.current() if task is None else task)
    if spec.inputs is None or backbone is not None:
        source = registry.source
        given = source.name if backbone is None and source and source.by_hand else backbone
        name = source.name if given is None and source else given
        spec.inputs = noted_inputs(model, spec.name, spec.notes, given, name, online)
    return Preprocess(spec.inputs)


def noted_inputs(
    model: nn.Module, task: str, notes: Mapping[str, Any], by_hand: str | None, name: str | None, online: bool
) -> Inputs:
    """Rebuild a task's inputs from its notes, or from the backbone where they say nothing.

    Args:
        model: the backbone.
        task: name of the task.
        notes: of the task.
        by_hand: name of the backbone, if it is of the caller's own choice.
        name: name of the backbone, whoever chose it.
        online: whether a tokenizer that only the notes name may be downloaded.

    Raises:
        VisadaptError: the notes are damaged, name a tokenizer that no file may choose, or it is not known how the
            task's inputs are prepared.
    """
    description = notes.get("inputs")
    if description is None:
        processor = partial(image_processor, online=online) if by_hand is None else processor_of
        description = described(_of_backbone(model, task, name, processor))
    return from_description(description, backbone=by_hand, online=online)


def same_inputs(model: nn.Module, names: Sequence[str]) -> Preprocess | None:
    """How the inputs of several tasks are prepared; None if they differ."""
    first, *others = [preprocess(model, name) for name in dict.fromkeys(names)]
    return first if all(other.inputs == first.inputs for other in others) else None


def _of_backbone(model: nn.Module, task: str, name: str | None, processor: Callable[[str], Any]) -> Inputs:
    inputs = inputs_of(model, name or type(model).__name__, processor=processor)
    if name is None and not isinstance(inputs, ImageInputs):
        raise VisadaptError(
            f"task {task!r} does not record its tokenizer: name the backbone, such as backbone='hf/bert-base-uncased'"
        )
    return inputs
