"""The JSON objects that the methods' ``--json`` prints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt_cli.api import DistillOutcome, PruneOutcome, QuantizeOutcome, ShareOutcome, TrainOutcome
    from modelopt_cli.artifact import Written
    from modelopt_cli.measure import Evaluation


def quantized_json(outcome: "QuantizeOutcome") -> dict[str, Any]:
    """The object that ``quantize --json`` prints.

    ``output`` is null after ``--dry-run``, ``evaluation`` (as ``eval --json`` prints it) where nothing
    was measured, ``snr_db`` (of the outputs) where nothing could be run.
    """
    from modelopt_cli import report

    return {
        "schema_version": 1,
        "output": _written_json(outcome.written),
        "predicted_bytes": outcome.predicted_bytes,
        "snr_db": outcome.snr_db,
        "layers": [vars(layer) for layer in outcome.coverage.layers],
        "compressed": report.coverage_json(outcome.coverage),
        "notes": list(outcome.notes),
        "evaluation": _evaluation_json(outcome.evaluation),
    }


def pruned_json(outcome: "PruneOutcome") -> dict[str, Any]:
    """The object that ``prune --json`` prints.

    ``output`` is null after ``--dry-run``, ``evaluation`` (as ``eval --json`` prints it) where nothing
    was measured.
    """
    from modelopt_cli import report

    return {
        "schema_version": 1,
        "output": _written_json(outcome.written),
        "predicted_bytes": outcome.predicted_bytes,
        "layers": report.pruned_json(outcome.layers),
        "compressed": report.coverage_json(outcome.coverage),
        "target": None if outcome.target is None else vars(outcome.target),
        "notes": list(outcome.notes),
        "evaluation": _evaluation_json(outcome.evaluation),
    }


def shared_json(outcome: "ShareOutcome") -> dict[str, Any]:
    """The object that ``share --json`` prints.

    ``output`` is null after ``--dry-run``, ``evaluation`` (as ``eval --json`` prints it) where nothing
    was measured, ``target`` without ``--bits auto``.
    """
    from modelopt_cli import report

    return {
        "schema_version": 1,
        "output": _written_json(outcome.written),
        "predicted_bytes": outcome.predicted_bytes,
        "coverage": [vars(layer) for layer in outcome.coverage.layers],
        "layers": report.shared_json(outcome.layers),
        "compressed": report.coverage_json(outcome.coverage),
        "target": None if outcome.target is None else vars(outcome.target),
        "notes": list(outcome.notes),
        "evaluation": _evaluation_json(outcome.evaluation),
    }


def trained_json(outcome: "TrainOutcome") -> dict[str, Any]:
    """The object that ``train --json`` prints; ``evaluation`` is as ``eval --json`` prints it, or null."""
    trained = outcome.trained
    return {
        "schema_version": 1,
        "output": _written_json(outcome.written),
        "training": {
            "epochs": trained.epochs,
            "steps": trained.steps,
            "loss": trained.loss,
            "best": trained.best,
            "best_epoch": trained.best_epoch,
            "seconds": trained.seconds,
            "lr": trained.lr,
            "returns": trained.returns,
        },
        "evaluation": _evaluation_json(outcome.evaluation),
    }


def distilled_json(outcome: "DistillOutcome") -> dict[str, Any]:
    """The object that ``distill --json`` prints; ``evaluation`` is as ``eval --json`` prints it, or null."""
    return {
        "schema_version": 1,
        "output": _written_json(outcome.written),
        "scratch": _written_json(outcome.scratch),
        "distillation": outcome.entry,
        "evaluation": _evaluation_json(outcome.evaluation),
    }


def _written_json(written: "Written | None") -> dict[str, Any] | None:
    if written is None:
        return None
    return {"path": str(written.path), "file_bytes": written.file_bytes, "sha256": written.sha256}


def _evaluation_json(evaluation: "Evaluation | None") -> dict[str, Any] | None:
    from modelopt_cli import report

    return None if evaluation is None else report.to_json(evaluation)
