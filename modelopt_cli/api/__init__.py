"""The commands behind the Python API and the command line: one request in, one result out."""

from modelopt_cli.api.evaluating import evaluate_files
from modelopt_cli.api.inspecting import Layer, layers, layers_of, sensitivity
from modelopt_cli.api.loading import load, load_network, load_state_dict
from modelopt_cli.api.pipeline import execute
from modelopt_cli.api.request import EvalRequest, Request, Student, TrainingRequest
from modelopt_cli.api.result import Measured, Result
from modelopt_cli.api.verbs import distill, evaluate, prune, quantize, save, share, train

__all__ = [
    "EvalRequest",
    "Layer",
    "Measured",
    "Request",
    "Result",
    "Student",
    "TrainingRequest",
    "distill",
    "evaluate",
    "evaluate_files",
    "execute",
    "layers",
    "layers_of",
    "load",
    "load_network",
    "load_state_dict",
    "prune",
    "quantize",
    "save",
    "sensitivity",
    "share",
    "train",
]
