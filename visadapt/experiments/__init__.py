"""Experiments: comparisons of ways to adapt one backbone, with the learning rate of each found on validation data."""

from visadapt.experiments.compare import compare as compare
from visadapt.experiments.compare import run as run
from visadapt.experiments.compare import sweep as sweep
from visadapt.experiments.compare import table as table
from visadapt.experiments.contender import Contender as Contender
from visadapt.experiments.plot import plot as plot
from visadapt.experiments.probe import fit_head as fit_head
from visadapt.experiments.problem import Problem as Problem
from visadapt.experiments.record import Record as Record
from visadapt.experiments.record import Result as Result
from visadapt.experiments.record import read_results as read_results
from visadapt.experiments.record import write_csv as write_csv
