"""Samples prepared as a task takes them."""

from __future__ import annotations

import threading
from random import Random
from typing import Any

from visadapt.data.inputs import TextInputs
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.serving.catalogue import Entry
from visadapt.serving.limits import Limits
from visadapt.serving.refusal import ServingError
from visadapt.serving.samples import Sample, check_resized, decode

_TOKENIZERS = threading.Lock()
# a fast tokenizer of transformers must not be used by two threads at once


def prepare(entry: Entry, sample: Sample, limits: Limits) -> Any:
    """Prepare a sample as a task takes it; the same as `visadapt.preprocess` does.

    An image is decoded here and not kept, so that one request holds one decoded image at a time.

    Returns:
        A batch of one: a tensor ``(1, 3, size, size)``, or a dict of tensors ``(1, L)``.

    Raises:
        ServingError: the task takes inputs of another kind, the image cannot be decoded, or it is too large.
    """
    inputs, value = entry.inputs, sample.value
    takes = entry.kind
    given = "image" if sample.kind == "image" else "text" if isinstance(value, str) else "pair of texts"
    # a line with a tab is a pair, as on the command line
    if given != takes and not (takes == "pair of texts" and given == "text" and "\t" in value):
        message = f"an input of task {entry.name!r} must be of kind {takes}, got {given}"
        raise ServingError("wrong_input", message, f"send {_EXAMPLES[takes]}")
    try:
        if isinstance(inputs, TextInputs):
            with _TOKENIZERS:
                return inputs.read([value])
        image = decode(sample, limits)
        check_resized(image, inputs.size, limits)
        return inputs(inputs.read([image]))
    except ServingError:
        raise
    except VisadaptError as error:
        raise ServingError("undecodable", str(error), "send another input") from error


_EXAMPLES = {
    "image": '{"image": "<base64>"}',
    "text": '{"text": "…"}',
    "pair of texts": '{"text": ["…", "…"]}',
}


def example(entry: Entry, seed: int, length: int = 4) -> Sample:
    """Make a meaningless sample of the kind that a task takes.

    Args:
        entry: the task.
        seed: another sample for each.
        length: words of a text; texts of one length have as many tokens.
    """
    if isinstance(entry.inputs, TextInputs):
        text = " ".join([str(seed % 10), *["word"] * (length - 1)])
        return Sample("text", (text, text) if entry.inputs.pairs else text)
    size = min(entry.inputs.size, 512)
    image = require("PIL.Image", "an image", "pillow")
    return Sample("image", image.frombytes("RGB", (size, size), Random(seed).randbytes(3 * size * size)))


def sides(entry: Entry, length: int) -> set[int]:
    """Return the sizes of the axes, beside that of the samples, of the inputs that an example becomes."""
    prepared = prepare(entry, example(entry, 0, length), Limits())
    tensors = prepared.values() if isinstance(prepared, dict) else [prepared]
    return {size for tensor in tensors for size in tensor.shape[1:]}
