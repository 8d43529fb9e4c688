"""Problems of text classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visadapt.data import TextSplit, load_text, tokenizer_of
from visadapt.experiments.problems import Problem, Splits, drawn
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
        tokenizer = tokenizer_of(self.network)

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
