"""Training: recipes, the loop, metrics. Imported when asked for: ``import visadapt.training``."""

from visadapt.training.evaluate import evaluate as evaluate
from visadapt.training.evaluate import predict as predict
from visadapt.training.fit import fit as fit
from visadapt.training.history import Epoch as Epoch
from visadapt.training.history import Fit as Fit
from visadapt.training.log import JsonLines as JsonLines
from visadapt.training.log import TensorBoard as TensorBoard
from visadapt.training.metrics import METRICS as METRICS
from visadapt.training.objective import Diverged as Diverged
from visadapt.training.recipe import SCHEDULES as SCHEDULES
from visadapt.training.recipe import Recipe as Recipe
from visadapt.training.recipes import RECIPES as RECIPES
from visadapt.training.samples import Samples as Samples
from visadapt.training.samples import ready as ready
from visadapt.training.samples import tokenised as tokenised
from visadapt.training.samples import trimmed as trimmed
