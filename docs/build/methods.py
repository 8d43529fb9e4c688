"""Writes docs/methods.md: every method, its paper and equation, where it goes by default and what it trains.

python docs/build/methods.py
"""

from pathlib import Path

import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import visadapt
from visadapt.table import Table

TARGET = Path(__file__).parent.parent / "methods.md"

INTRO = """# Methods

Made by `python docs/build/methods.py`. Each goes through the same calls: `visadapt.inject(model, visadapt.Parallel(),
task="flowers", num_classes=102)`, with `where=` for other sites (`op`: every convolution, linear and norm) and `norms=`
for what the task owns of the norms. [Add a method](add-a-method.md) adds one more. Counts are of the adapters alone,
with default options: no norms, no head; in per cent of the backbone without its head, for torchvision's ResNet-50 and
for BERT-base.

"""


def backbones() -> dict[str, nn.Module]:
    """ResNet-50 and BERT-base, without weights: only shapes count here."""
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig())
        return {"ResNet-50": torchvision.models.resnet50(), "BERT-base": bert}


def trained(model: nn.Module, method: visadapt.Method) -> str:
    """Parameters of a method's adapters, or why it has none."""
    try:
        visadapt.inject(model, method, norms="frozen", head="frozen")
    except visadapt.VisadaptError:
        return "no such site" if method.kinds else "none"
    row = visadapt.summary(model)["default"]
    visadapt.remove(model, "default")
    return f"{row.adapters:,} ({100 * row.fraction:.2f} %)" if row.adapters else "none"


def page() -> str:
    """The whole page."""
    models = backbones()
    rows = []
    for name, method in visadapt.METHODS.items():
        equation = (method.__doc__ or "").strip().splitlines()[0].rstrip(".")
        made = method()
        names = [made.where] if isinstance(made.where, str) else made.kinds
        kinds = ", ".join(f"`{kind}`" for kind in names) or "–"
        rows.append((f"`{name}`", equation, kinds, *(trained(model, made) for model in models.values())))
    table = Table(("method", "what (paper)", "default sites", *models), rows)
    return INTRO + table.markdown() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page())
