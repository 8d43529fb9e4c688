"""Texts for a language backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visadapt.data.samples import Samples, tokenised, trimmed
from visadapt.data.splits import Splits, renumbered
from visadapt.data.targets import problem_type
from visadapt.data.text import TextSplit, load_text
from visadapt.data.text_sources import options_of
from visadapt.data.tokenizers import tokenizer_of
from visadapt.errors import VisadaptError, option
from visadapt.typed import check_integer

LONGEST = 131072
"""Upper bound of a text in tokens, so that no file can exhaust the memory."""


@dataclass(frozen=True)
class TextInputs:
    """Texts for a language backbone; calling it with a batch of tokens cuts off columns that are all padding.

    Args:
        tokenizer: ``"bundled/minilm"`` or ``"hf/<name or folder>"``, as the backbone is named.
        length: maximum number of tokens; longer texts are truncated.
        pairs: whether a sample is a pair of texts.
        loader: loads the tokenizer by its name; not part of the description.
    """

    tokenizer: str
    length: int = 128
    pairs: bool = False
    loader: Callable[[str], Any] = field(default=tokenizer_of, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self.length, LONGEST, "length", "tokens")

    def __call__(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        return trimmed(tokens)

    @property
    def form(self) -> tuple[str, Any]:
        """What inputs must have in common to be collated: ``("texts", tokenizer)``."""
        return "texts", self.tokenizer

    def collate(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join batches that were prepared one by one, ``(N, L)`` each, padded to the longest text."""
        tokenizer = self.tokens
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        longest = max(batch["input_ids"].shape[1] for batch in batches)

        def padded(name: str, values: Tensor) -> Tensor:
            missing = longest - values.shape[1]
            sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
            return F.pad(values, sides, value=fill.get(name, 0))

        return {name: torch.cat([padded(name, batch[name]) for batch in batches]) for name in batches[0]}

    def read(self, lines: Iterable[Any]) -> dict[str, Tensor]:
        """Tokenise texts, ``(N, L)`` each; a pair of texts is a tuple, or a line with a tab between the two.

        Raises:
            VisadaptError: a line is not a pair, and the task takes pairs.
        """
        texts: list[Any] = list(lines)
        if self.pairs:
            texts = [line if isinstance(line, tuple) else tuple(line.split("\t", 1)) for line in texts]
            single = next((pair[0] for pair in texts if len(pair) == 1), None)
            if single is not None:
                raise VisadaptError(f"a line must be a pair of texts separated by a tab, got {single[:60]!r}")
        made = self._tokens(TextSplit(texts, torch.zeros(len(texts), dtype=torch.int64))).inputs
        assert isinstance(made, dict)
        return made

    def load(
        self,
        name: str,
        *,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        noted: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Splits:
        """Load a data set.

        Args:
            name: as `visadapt.data.load_text` takes it.
            labels: class names in the task's order; None for those of the data.
            seed: seed of splits that the data set does not define.
            noted: further options, such as a task's notes, for data that is described by them; other data ignores them.
            **options: passed to `visadapt.data.load_text`.
        """
        if wrong := sorted(options.keys() & {"image", "download"}):
            raise VisadaptError(f"{name}: {' and '.join(map(option, wrong))} apply to images only, and these are texts")
        taken, _ = options_of(name, options.get("root"))
        described = {key: value for key, value in (noted or {}).items() if key in taken}
        found = load_text(name, seed=seed, classes=labels, **{**described, **options})
        found = found if labels is None else renumbered(found, labels)
        splits = (found.train, found.validation, found.test)
        train, validation, test = (self._tokens(split) if len(split) else None for split in splits)
        if test is None:
            raise VisadaptError(f"{name} has no texts to test")
        inputs = dataclasses.replace(self, pairs=not isinstance(found.test.texts[0], str))
        kind = problem_type(found.test.labels)
        return Splits(found.classes, train, validation, test, inputs, remarks=found.remarks, problem_type=kind)

    def _tokens(self, split: TextSplit) -> Samples:
        return tokenised(self.tokens, split, self.length)

    @cached_property
    def tokens(self) -> Any:
        """The tokenizer, loaded when it is first needed."""
        return self.loader(self.tokenizer)
