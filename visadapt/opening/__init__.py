"""From a task file to predictions: open, preprocess, predict."""

from visadapt.opening.loading import open as open
from visadapt.opening.predicting import Prediction as Prediction
from visadapt.opening.predicting import predict as predict
from visadapt.opening.preparing import preprocess as preprocess
