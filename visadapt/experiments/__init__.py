"""Experiments: the papers' claims as data. Each run is computed once and its results are kept in a folder."""

from visadapt.experiments.ablation import Ablation as Ablation
from visadapt.experiments.base import Experiment as Experiment
from visadapt.experiments.base import run_experiment as run_experiment
from visadapt.experiments.catalogue import contender as contender
from visadapt.experiments.compare import Compare as Compare
from visadapt.experiments.contenders import Contender as Contender
from visadapt.experiments.crossmodal import Crossmodal as Crossmodal
from visadapt.experiments.decathlon import Decathlon as Decathlon
from visadapt.experiments.images import ImageProblem as ImageProblem
from visadapt.experiments.init_scale import InitScale as InitScale
from visadapt.experiments.modality import Modality as Modality
from visadapt.experiments.problem_names import problem as problem
from visadapt.experiments.problems import Problem as Problem
from visadapt.experiments.record import Result as Result
from visadapt.experiments.record import read_results as read_results
from visadapt.experiments.record import write_csv as write_csv
from visadapt.experiments.sequence import Sequence as Sequence
from visadapt.experiments.texts import TextProblem as TextProblem
from visadapt.experiments.tradeoff import Tradeoff as Tradeoff
from visadapt.experiments.transfer import Transfer as Transfer
