"""From a task file to predictions, and to a repository: open, preprocess, predict, push_to_hub."""

from visadapt.opening.loading import open as open
from visadapt.opening.predicting import Prediction as Prediction
from visadapt.opening.predicting import predict as predict
from visadapt.opening.preparing import preprocess as preprocess
from visadapt.opening.pushing import push_to_hub as push_to_hub
