"""Write docs/methods.md: every method with its paper, equation, default sites and number of trained parameters.

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

Made by `python docs/build/methods.py`. All methods use the same call, `visadapt.inject(model, visadapt.Parallel(),
task="flowers", num_classes=102)`, with `where=` for other sites (`op`: every convolution, linear and norm) and `norms=`
for the norm parameters that the task owns. [Add a method](add-a-method.md) shows how to write your own. Counts are
parameters of the adapters with default options, without norms and head, for torchvision's ResNet-50 and BERT-base;
percentages are of the backbone without its head.

A site is where an operator with a weight puts channels: on axis 1 of a series (`NCL`), map (`NCHW`) or volume
(`NCDHW`), or on the last axis (`NLC`, `NHWC`, `NDHWC`). `Bottleneck`, `Linear`, `Norms`, `SSF` and the own-weights
methods stand at all of them; `Parallel`, `LoRA`, `DoRA`, `DAN` and `TSA` at every convolution (1-D, 2-D, 3-D) and
linear; `Series` and `ConvAdapter` where positions have neighbours, that is not on token sequences; `Mona` there and on
tokens whose map is known. No kernel can stand beside a transposed convolution: what acts on its output can stand behind
it. `CoLoRA` changes the convolutions of ConvNeXt blocks and of a ResNet's bottleneck blocks. `Ladder` is a network of
its own beside the blocks, with frozen norms: no gradient flows through the backbone, and `cache_prefix` keeps all
outputs of its blocks. An output whose channel axis no operator establishes is refused by name.

"""


def backbones() -> dict[str, nn.Module]:
    """Make ResNet-50 and BERT-base without weights: only shapes are needed."""
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig())
        return {"ResNet-50": torchvision.models.resnet50(), "BERT-base": bert}


def trained(model: nn.Module, method: visadapt.Method) -> str:
    """Count the parameters of a method's adapters, or say why there are none."""
    try:
        visadapt.inject(model, method, norms="frozen", head="frozen")
    except visadapt.VisadaptError:
        return "no such site" if method.kinds else "none"
    row = visadapt.summary(model)["default"]
    visadapt.remove(model, "default")
    return f"{row.adapters:,} ({100 * row.fraction:.2f} %)" if row.adapters else "none"


def page() -> str:
    """Make the page."""
    models = backbones()
    rows = []
    for name, cls in visadapt.METHODS.items():
        equation = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        method = cls()
        names = [method.where] if isinstance(method.where, str) else method.kinds
        kinds = ", ".join(f"`{kind}`" for kind in names) or "–"
        rows.append((f"`{name}`", equation, kinds, *(trained(model, method) for model in models.values())))
    table = Table(("method", "what (paper)", "default sites", *models), rows)
    return INTRO + table.markdown() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page())
