"""The commands as functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelopt_cli.api.evaluating import evaluate_files
from modelopt_cli.api.pipeline import execute
from modelopt_cli.api.request import EvalRequest, Request
from modelopt_cli.api.result import Result
from modelopt_cli.measure import Evaluation
from modelopt_cli.methods.table import METHODS


def _method(command: str, source: str | Path, output: str | Path, options: dict[str, Any]) -> Result:
    method = METHODS[command]
    config = options.pop("config", None) or method.config()
    given = {"config": config, "code": method.code(config)} | options
    return execute(Request(command=command, source=source, output=output, **given))


def quantize(source: str | Path, output: str | Path, **options: Any) -> Result:
    """Quantize a checkpoint into a file and measure the two side by side."""
    return _method("quantize", source, output, options)


def prune(source: str | Path, output: str | Path, **options: Any) -> Result:
    """Prune a checkpoint into a file, fine-tune it on the way, and measure the two side by side."""
    return _method("prune", source, output, options)


def share(source: str | Path, output: str | Path, **options: Any) -> Result:
    """Cluster weights (palettization), fine-tune them, write a file, and measure the two side by side."""
    return _method("share", source, output, options)


def distill(teacher: str | Path, output: str | Path, **options: Any) -> Result:
    """Teach a student what a teacher knows, write its file, and measure the two side by side."""
    return _method("distill", teacher, output, options)


def train(source: str | Path | None, output: str | Path, **options: Any) -> Result:
    """Train a network into a file, from scratch or from a checkpoint, and measure it."""
    return execute(Request(command="train", source=source, output=output, **options))


def evaluate(paths: str | Path | Sequence[str | Path], **options: Any) -> Evaluation:
    """Measure checkpoints and artifacts side by side."""
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    return evaluate_files(EvalRequest(paths=several, **options))
