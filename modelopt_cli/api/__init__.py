"""The Python API: the same verbs as the command line, with the same meaning."""

from modelopt_cli.api.distilling import DistillOutcome, Student, distill
from modelopt_cli.api.evaluating import evaluate
from modelopt_cli.api.inspecting import Layer, layers
from modelopt_cli.api.loading import load, load_network, load_state_dict
from modelopt_cli.api.planning import Plan
from modelopt_cli.api.pruning import PruneOutcome, prune, sensitivity
from modelopt_cli.api.quantizing import QuantizeOutcome, quantize
from modelopt_cli.api.sharing import ShareOutcome, share
from modelopt_cli.api.training import TrainOutcome, train
from modelopt_cli.api.tuning import TrainingRequest

__all__ = [
    "DistillOutcome",
    "Layer",
    "Plan",
    "PruneOutcome",
    "QuantizeOutcome",
    "ShareOutcome",
    "Student",
    "TrainOutcome",
    "TrainingRequest",
    "distill",
    "evaluate",
    "layers",
    "load",
    "load_network",
    "load_state_dict",
    "prune",
    "quantize",
    "sensitivity",
    "share",
    "train",
]
