"""Backbones of transformers as classifiers, whatever their config says that they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from visadapt.optional import require
from visadapt.reading import check_readable

_LOADING = ("revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder")
"""Options that the config of a model is loaded with, too."""

_KINDS = ("SequenceClassification", "ImageClassification", "AudioClassification")


class PooledClassifier(nn.Module):
    """A linear classifier of the pooled output of an encoder that has no classifier of its own.

    The output is pooled as the encoder does it, or else is the mean over all tokens (DINOv3 and CLIP's and SigLIP's
    towers pool; a plain encoder may not).

    Args:
        encoder: a model of transformers.
        classes: number of logits.
    """

    def __init__(self, encoder: nn.Module, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config = config
        self.main_input_name: str = getattr(encoder, "main_input_name", "input_ids")
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.classifier = nn.Linear(width, classes)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Compute the logits, ``(N, classes)``, of the encoder's inputs."""
        out = self.encoder(*inputs, **named)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = out.last_hidden_state.mean(1)
        logits: Tensor = self.classifier(pooled.flatten(1))
        return logits


def pretrained(name: str, **build: Any) -> nn.Module:
    """Load a model of transformers with the head of a classifier: of texts, images or audio, as its config says.

    A text model that has no padding token, such as GPT-2, pads with its end-of-text token.

    Args:
        name: of a repository, or a folder.
        **build: passed to ``from_pretrained``.
    """
    transformers = require("transformers", f"'hf/{name}'", "visadapt[text]")
    check_readable(name)
    config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in build.items() if k in _LOADING})
    with _quiet(transformers.utils.logging):
        kind = _kind(config, transformers)
        if kind is None:
            classes = build.pop("num_labels", 2)
            model: nn.Module = PooledClassifier(transformers.AutoModel.from_pretrained(name, **build), classes)
        else:
            model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name, **build)
    own: Any = model.config
    if getattr(own, "pad_token_id", None) is None and isinstance(getattr(own, "eos_token_id", None), int):
        own.pad_token_id = own.eos_token_id
    return model


def unfilled(folder: str, **sizes: Any) -> nn.Module:
    """Build what `pretrained` loads from a folder, without its weights, on the default device.

    Args:
        folder: of a repository.
        **sizes: options of the config.
    """
    transformers = require("transformers", f"'hf/{folder}'", "visadapt[text]")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **sizes)
    with _quiet(transformers.utils.logging):
        kind = _kind(config, transformers)
        if kind is None:
            return PooledClassifier(transformers.AutoModel.from_config(config), sizes.get("num_labels", 2))
        model: nn.Module = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        return model


def _kind(config: Any, transformers: Any) -> str | None:
    """The kind of classifier that transformers has for a config; where it has several, that of the stored weights."""
    auto = transformers.models.auto.modeling_auto
    mapped = [
        kind
        for kind, words in zip(_KINDS, ("SEQUENCE", "IMAGE", "AUDIO"), strict=True)
        if type(config) in getattr(auto, f"MODEL_FOR_{words}_CLASSIFICATION_MAPPING")
    ]
    stored = " ".join(getattr(config, "architectures", None) or ())
    return next((kind for kind in mapped if kind in stored), mapped[0] if mapped else None)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep transformers from warning that a new head is new, which is what it is for, and from drawing bars."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
