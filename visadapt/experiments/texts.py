"""Problems of text classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.data import TextSplit, load_text, minilm_path
from visadapt.errors import VisadaptError
from visadapt.experiments.problem import Problem, Splits, drawn
from visadapt.training import Samples, tokenised


@dataclass(frozen=True)
class TextProblem(Problem):
    """Texts or pairs of texts, as :func:`visadapt.data.load_text` loads them, for a backbone of transformers.

    CoLA is scored by Matthews' correlation, as GLUE does, all else by accuracy.

    Args:
        length: tokens; longer texts are cut.
    """

    length: int = 64

    modality: ClassVar[str] = "text"

    @property
    def metric(self) -> str:
        return "matthews" if self.name == "cola" else "accuracy"

    def load(self) -> Splits:
        data = load_text(self.data, root=self.root)
        tokenizer = self._tokenizer()

        def samples(split: TextSplit, most: int | None) -> Samples:
            # the shortest first, so that batches in order have little padding
            order = sorted(drawn(len(split), most).tolist(), key=lambda i: len("".join(split.texts[i])))
            return tokenised(tokenizer, split.subset(order), self.length)

        return Splits(
            data.classes,
            samples(data.train, self.train),
            samples(data.validation, self.validation),
            samples(data.test, self.test),
        )

    def _tokenizer(self) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise VisadaptError("problems of text need transformers: pip install 'visadapt[text]'") from error
        source = str(minilm_path()) if self.network == "bundled/minilm" else self.network.removeprefix("hf/")
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise VisadaptError(f"transformers finds no tokenizer of {source!r}: {error}") from error
