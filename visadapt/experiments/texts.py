"""Problems of text classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visadapt.data import TextSplit, load_text, tokenizer_of
from visadapt.data.inputs import Splits, TextInputs
from visadapt.data.text_sources import options_of
from visadapt.experiments.problems import Problem, subset_indices
from visadapt.training import Samples, tokenised


@dataclass(frozen=True)
class TextProblem(Problem):
    """Texts or pairs of texts, as `visadapt.data.load_text` loads them, for a backbone from transformers.

    The metric of CoLA is the Matthews correlation, as in GLUE; all other sets use accuracy.

    Args:
        network: name of the backbone, ``"bundled/minilm"`` or ``"hf/…"``.
        data: name or path of the data set.
        train: number of training texts; None for all.
        validation: number of validation texts; None for all of the set's own.
        test: number of test texts; None for all.
        root: folder that contains the data set, if ``data`` is relative to one.
        options: options of the backbone's builder, as pairs.
        table: options of a table's columns and labels, as pairs, as `visadapt.data.load_text` takes them.
        scored_by: metric that chooses and is reported; None for the usual one of such labels.
        length: number of tokens; longer texts are truncated.

    Examples:
        >>> from visadapt.experiments import TextProblem
        >>> TextProblem("bundled/minilm", "cola", root="glue", length=32).metric
        'matthews'
    """

    length: int = 64

    modality: ClassVar[str] = "text"

    @property
    def usual_metric(self) -> str:
        # GLUE's set, and not any file of the name
        return "matthews" if self.data == "cola" else super().usual_metric

    @property
    def uses_root(self) -> bool:
        return "root" in options_of(self.data, self.root)[0]

    def load(self) -> Splits:
        data = load_text(self.data, root=self.root if self.uses_root else None, **dict(self.table))
        tokenizer = tokenizer_of(self.network)

        def samples(split: TextSplit, limit: int | None) -> Samples:
            # shortest first, so that consecutive batches have little padding
            order = sorted(subset_indices(len(split), limit).tolist(), key=lambda i: len("".join(split.texts[i])))
            return tokenised(tokenizer, split.subset(order), self.length)

        return Splits(
            data.classes,
            samples(data.train, self.train),
            samples(data.validation, self.validation),
            samples(data.test, self.test),
            TextInputs(self.network, self.length, pairs=not isinstance(data.test.texts[0], str)),
            data.remarks,
        )
