"""Notes on results: what was gained, and what was lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelopt_cli.api.opening import file_length
from modelopt_cli.artifact import Written
from modelopt_cli.checkpoint import Opened
from modelopt_cli.checkpoint.state_file import state_bytes
from modelopt_cli.measure.layer_comparison import Fall
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.measure.size import Size, safetensors_bytes, times_smaller
from modelopt_cli.methods.method_table import Signal
from modelopt_cli.settings import option
from modelopt_cli.training import Trained

_FEW = 0.5  # share of the weights' bytes below which a warning says how little was compressed


def gain_notes(
    opened: Opened, coverage: Coverage, written: Written | None, predicted_bytes: int, remedy: str = ""
) -> tuple[str, ...]:
    """One warning for each way in which a method gained less than one would think.

    Args:
        opened: the original.
        coverage: what became of each layer.
        written: the file; None where none was written.
        predicted_bytes: length that it would have.
        remedy: a way to compress more, where there is one.
    """
    notes = []
    if coverage.byte_fraction < _FEW:
        line = f"warning: only {100 * coverage.byte_fraction:.1f} % of the weights' bytes are compressed"
        notes.append(f"{line}; {remedy}" if remedy else line)
    source = Path(opened.path)
    stored = opened.tensor_bytes or safetensors_bytes(source) or state_bytes(opened.state)
    before = Size(file_length(source, opened), 0, 0, None, stored)
    if written is None:
        after = Size(predicted_bytes, 0, 0, None)
    else:
        after = Size(written.file_bytes, 0, 0, None, safetensors_bytes(written.path))
    ratio = times_smaller(after, before)
    if ratio is not None and round(ratio, 2) <= 1:
        notes.append(
            f"warning: the file is not smaller than its source: {_described(after)}, "
            f"before {_described(before)}"
        )
    return tuple(notes)


def signal_note(snr_db: float | None) -> tuple[str, ...]:
    """The line that says how much of the outputs is left."""
    return (
        ()
        if snr_db is None
        else (f"outputs keep {snr_db:.1f} dB of signal to noise on the few samples checked before writing",)
    )


def nan_note(share: float) -> str:
    """A warning that a share of the original's outputs, 0 to 1, is NaN, and what that leaves to compare."""
    if share == 1:
        return "warning: signal to noise not measured: the network's output is not a number (NaN)"
    line = f"warning: {100 * share:.3g} % of the original's outputs are not a number (NaN)"
    return f"{line}; signal to noise is of the others"


def loss_note(snr_db: float, usual: Signal, fall: Fall | None, *, trained: bool = False) -> str:
    """A warning that the outputs are not those of the original, and what to try.

    Args:
        snr_db: signal-to-noise of the outputs.
        usual: what rounding alone leaves.
        fall: the layer after which it falls the most, or None.
        trained: True if training followed, which moves ranges from where an observer put them.
    """
    remedy = f"train for more {option('epochs')}" if trained else f"try another {option('observer')}"
    line = f"warning: the outputs keep {snr_db:.1f} dB of signal to noise, "
    line += f"where {usual.bits} bits keep {usual.least_db:g}"
    if fall is None:
        return f"{line}; {remedy}, or leave layers out with {option('exclude')}"
    drop = f"from {fall.before:.1f} to {fall.after:.1f} dB"
    line += f"; it falls {drop} after layer {fall.layer}"
    return f"{line}: leave that out with {option('exclude')}, or {remedy}"


def training_note(trained: Trained) -> str:
    """The line that says how training went."""
    epochs = f"{trained.epochs} epoch{'s' * (trained.epochs != 1)}"
    line = f"trained {epochs}, {trained.steps:,} steps; last loss {trained.loss:.4f}"
    if trained.best is None:
        return line
    return (
        f"{line}; kept epoch {trained.best_epoch}, {trained.best:.2f}{trained.unit} on the validation samples"
    )


def integer_training_note(entry: Mapping[str, Any]) -> str:
    """The line that says how a quantized network learned, from its entry in the history."""
    figures = entry["trained"]
    first, last = figures["first_loss"], figures["last_loss"]
    line = f"trained on {entry['training']['data']}, {_steps(figures)}"
    return f"{line}; loss {first:.4f} at the first step, {last:.4f} on average in the last epoch"


def distillation_notes(entry: dict[str, object]) -> tuple[str, ...]:
    """The lines that say how a student learned, from its entry in the history."""
    settings, finetuned, compared = entry["config"], entry.get("finetuned"), entry.get("compared", {})
    assert isinstance(settings, dict)
    assert isinstance(compared, dict)
    line = f"learned {settings['loss']}, {_steps(entry)}"
    if isinstance(finetuned, dict):
        line += f"; then the labels alone, {_steps(finetuned)}"
    return (line, *(f"{term} compared {', '.join(at)}" for term, at in compared.items()))


def _steps(figures: Mapping[str, Any]) -> str:
    line = f"{figures['epochs']} epoch{'s' * (figures['epochs'] != 1)}, {figures['steps']:,} steps"
    if "best" not in figures:
        return line
    best = f"{figures['best']:.2f}{figures.get('unit', ' %')} on the validation samples"
    return f"{line}, kept epoch {figures['best_epoch']} ({best})"


def _described(size: Size) -> str:
    tensors = "" if size.tensor_bytes is None else f" with {size.tensor_bytes:,} bytes of tensors"
    return f"{size.file_bytes:,} bytes{tensors}"
