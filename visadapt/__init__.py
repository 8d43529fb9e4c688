"""visadapt adapts one frozen pretrained network to many tasks by small residual modules."""

from visadapt.backbone.site import Site, Sites
from visadapt.backbone.where import sites
from visadapt.combining import combine
from visadapt.errors import VisadaptError
from visadapt.export.folding import fold
from visadapt.export.merging import merge, merge_error, unmerge
from visadapt.frozen import cache_prefix, lean, unlean
from visadapt.injection import eject, inject, remove
from visadapt.methods import (
    DAN,
    METHODS,
    SSF,
    TSA,
    AdaptFormer,
    Biases,
    Bottleneck,
    CoLoRA,
    ConvAdapter,
    DoRA,
    Full,
    Ladder,
    Linear,
    LoRA,
    Method,
    Mona,
    Norms,
    Parallel,
    Series,
    TopLayers,
)
from visadapt.opening import Prediction, predict, preprocess, push_to_hub
from visadapt.opening import open as open  # not in __all__: a star import leaves Python's own in place
from visadapt.runtime.costs import summary
from visadapt.runtime.decider import decide, fit_decider, load_decider, save_decider
from visadapt.runtime.logits import split
from visadapt.runtime.options import set_alpha
from visadapt.runtime.parameters_of import named_parameters, parameters, trainable
from visadapt.runtime.registry import tasks
from visadapt.runtime.selection import activate, active, using
from visadapt.task_file import load, save

__version__ = "0.1.0"

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
    "Prediction",
    "Series",
    "Site",
    "Sites",
    "TopLayers",
    "VisadaptError",
    "activate",
    "active",
    "cache_prefix",
    "combine",
    "decide",
    "eject",
    "fit_decider",
    "fold",
    "inject",
    "lean",
    "load",
    "load_decider",
    "merge",
    "merge_error",
    "named_parameters",
    "parameters",
    "predict",
    "preprocess",
    "push_to_hub",
    "remove",
    "save",
    "save_decider",
    "set_alpha",
    "sites",
    "split",
    "summary",
    "tasks",
    "trainable",
    "unlean",
    "unmerge",
    "using",
]
