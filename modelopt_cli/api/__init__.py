"""The Python API: the same verbs as the command line, with the same meaning."""

from modelopt_cli.api.evaluating import evaluate
from modelopt_cli.api.loading import load, load_network
from modelopt_cli.api.quantizing import QuantizeOutcome, quantize

__all__ = ["QuantizeOutcome", "evaluate", "load", "load_network", "quantize"]
