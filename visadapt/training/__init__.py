"""Training loop, recipes and metrics. The core does not import this package: ``import visadapt.training``."""

from visadapt.data.samples import Samples as Samples
from visadapt.data.samples import ready as ready
from visadapt.data.samples import tokenised as tokenised
from visadapt.data.samples import trimmed as trimmed
from visadapt.training.evaluation import evaluate as evaluate
from visadapt.training.evaluation import predict as predict
from visadapt.training.fitting import fit as fit
from visadapt.training.history import Epoch as Epoch
from visadapt.training.history import Fit as Fit
from visadapt.training.log import JsonLines as JsonLines
from visadapt.training.log import TensorBoard as TensorBoard
from visadapt.training.losses import LOSSES as LOSSES
from visadapt.training.losses import Diverged as Diverged
from visadapt.training.metrics import METRICS as METRICS
from visadapt.training.recipe import SCHEDULES as SCHEDULES
from visadapt.training.recipe import Recipe as Recipe
from visadapt.training.recipes import RECIPES as RECIPES
