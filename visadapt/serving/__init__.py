"""Serving: one backbone in memory answers for many tasks, in Python and over HTTP."""

from visadapt.serving.limits import Limits as Limits
from visadapt.serving.refusal import ServingError as ServingError
from visadapt.serving.server import Answer as Answer
from visadapt.serving.server import Server as Server
