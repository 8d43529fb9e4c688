"""visadapt adapts one frozen pretrained network to many tasks by small residual modules."""

from visadapt.decider import decide, fit_decider, load_decider, save_decider
from visadapt.errors import VisadaptError
from visadapt.folding import fold
from visadapt.frozen import cache_prefix, lean, unlean
from visadapt.inject import eject, inject, remove
from visadapt.merge import merge, merge_error, unmerge
from visadapt.methods import (
    DAN,
    METHODS,
    SSF,
    TSA,
    AdaptFormer,
    Biases,
    Bottleneck,
    ConvAdapter,
    Full,
    Linear,
    LoRA,
    Method,
    Norms,
    Parallel,
    Series,
    TopLayers,
    set_alpha,
)
from visadapt.mixed import split
from visadapt.sites import Site, Sites, sites
from visadapt.store import load, save
from visadapt.tasks import activate, active, named_parameters, parameters, summary, tasks, trainable, using

__version__ = "0.1.0"

__all__ = [
    "DAN",
    "METHODS",
    "SSF",
    "TSA",
    "AdaptFormer",
    "Biases",
    "Bottleneck",
    "ConvAdapter",
    "Full",
    "Linear",
    "LoRA",
    "Method",
    "Norms",
    "Parallel",
    "Series",
    "Site",
    "Sites",
    "TopLayers",
    "VisadaptError",
    "activate",
    "active",
    "cache_prefix",
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
