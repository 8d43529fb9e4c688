"""Methods: what can be put at a site. Each is one file; a new method needs its file and a line in ``METHODS``."""

from visadapt.methods.adaptformer import AdaptFormer
from visadapt.methods.baselines import Linear, Norms
from visadapt.methods.bottleneck import Bottleneck
from visadapt.methods.colora import CoLoRA
from visadapt.methods.convadapter import ConvAdapter
from visadapt.methods.dan import DAN
from visadapt.methods.dora import DoRA
from visadapt.methods.ladder import Ladder
from visadapt.methods.lora import LoRA
from visadapt.methods.method import Method
from visadapt.methods.mona import Mona
from visadapt.methods.own_weights import Biases, Full, TopLayers
from visadapt.methods.parallel import Parallel
from visadapt.methods.series import Series
from visadapt.methods.ssf import SSF
from visadapt.methods.tsa import TSA

METHODS: dict[str, type[Method]] = {
    cls.__name__: cls
    for cls in (
        Bottleneck,
        Parallel,
        Series,
        TSA,
        DAN,
        ConvAdapter,
        SSF,
        LoRA,
        DoRA,
        CoLoRA,
        AdaptFormer,
        Mona,
        Ladder,
        Linear,
        Norms,
        Biases,
        TopLayers,
        Full,
    )
}
"""By name, as task files and command lines spell them."""

__all__ = [
    "DAN",
    "METHODS",
    "SSF",
    "TSA",
    "AdaptFormer",
    "Biases",
    "Bottleneck",
    "CoLoRA",
    "ConvAdapter",
    "DoRA",
    "Full",
    "Ladder",
    "Linear",
    "LoRA",
    "Method",
    "Mona",
    "Norms",
    "Parallel",
    "Series",
    "TopLayers",
]
