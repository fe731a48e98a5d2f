"""The Python API: the same verbs as the command line, with the same meaning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modelopt_cli
from modelopt_cli import artifact, measure
from modelopt_cli.checkpoint import Opened, require_network
from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.errors import CaptureError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure import gates as measure_gates
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize import QuantizeConfig
from modelopt_cli.methods.quantize.untraced import TensorResult, apply_to_state
from modelopt_cli.methods.table import METHODS
from modelopt_cli.opening import as_subject, open_input, open_source
from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.coverage import Coverage, coverage

Note = Callable[[str], None]


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    input: InputSpec | None = None,
    device: str = "cpu",
) -> Program:
    """Open a checkpoint or an artifact as a Program, ready to run.

    Args:
        path: a modelopt file, or any checkpoint whose network is recognised or named.
        arch: the architecture, as ``--arch`` takes it.
        input: shape and preprocessing of one sample, where the architecture does not imply it.
        device: "cpu" or a CUDA device.

    Returns:
        A callable on float tensors ``(N, *program.input.shape)``, with ``.graph``, ``.history``
        and ``.input``.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.
    """
    network = load_network(path, arch=arch, input=input, device=device)
    if not isinstance(network, Program):
        raise CaptureError("the network cannot be traced", where=str(path))
    return network


def load_network(
    path: str | Path,
    *,
    arch: str | None = None,
    input: InputSpec | None = None,
    device: str = "cpu",
) -> nn.Module:
    """As ``load``, but a network that cannot be traced is returned as the module it is."""
    opened = open_source(path, arch, input or open_input([path], arch, None, None))
    network = require_network(opened, path)
    return prepare(network, device) if isinstance(network, Program) else network.to(device).eval()


def evaluate(
    paths: Sequence[str | Path],
    *,
    arch: str | None = None,
    data: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> Evaluation:
    """Measure checkpoints and artifacts side by side.

    Args:
        paths: files, in the order of the table.
        arch: the architecture of those that are not artifacts and are not recognised.
        data: a data spec; without it, accuracy is not measured.
        overrides: preprocessing the user wants instead of the recorded one.
        options: what to measure and how; ``options.baseline`` is an index into ``paths``.
        gates: limits to apply; see ``measure.gates.require``.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: a file, the architecture or the data cannot be used.
    """
    options, gates = options or EvalOptions(), gates or Gates()
    if not paths:
        raise UsageError("nothing to measure", hint="name at least one file")
    measure_gates.require_comparable(gates, len(paths))
    wanted = open_input(paths, arch, data, overrides)
    opened = [_open(path, arch, wanted, on_note) for path in paths]
    pairs = list(zip(paths, opened, strict=True))
    return _measure(pairs, arch, data, overrides, options, gates, on_note, progress)


@dataclass(frozen=True)
class QuantizeOutcome:
    """What ``quantize`` did.

    Attributes:
        coverage: every weight-carrying layer, with what became of it.
        predicted_bytes: length of the file, known before it is written.
        written: the file, or None after a dry run.
        evaluation: source and result side by side, or None where nothing was measured.
    """

    coverage: Coverage
    predicted_bytes: int
    written: "artifact.Written | None"
    evaluation: Evaluation | None


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    config: QuantizeConfig | None = None,
    arch: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    evaluate: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> QuantizeOutcome:
    """Quantize a checkpoint into a file and measure the two side by side.

    Args:
        source: a checkpoint or an artifact.
        output: the file to write; an existing one only with ``force``.
        config: scheme, observer, layers.
        arch: the architecture, where it is not recognised.
        data: what to calibrate and evaluate on.
        calibration: what to calibrate on, where that is not ``data``.
        overrides: preprocessing the user wants instead of the implied one.
        options: how to measure, and the seed, device and batch sizes.
        gates: limits to apply to the result; the file stays even if one is not met.
        evaluate: whether to measure.
        force: replace an existing output.
        dry_run: do everything but write and measure.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: the source, the data, an option or the output cannot be used; nothing is written.
        NothingCompressed: not one layer could be quantized; nothing is written.
        EnvironmentFailure: no space, no permission.
    """
    config, options, gates = config or QuantizeConfig(), options or EvalOptions(), gates or Gates()
    if gates and not evaluate:
        raise UsageError("a gate needs the result to be measured", hint="leave out --no-eval or the gate")
    if not dry_run:
        artifact.check_output(output, force, [source])
    wanted = open_input([source], arch, calibration or data, overrides)
    opened = _open(source, arch, wanted, on_note)
    with threads(options.threads):
        result = _quantized(opened, config, calibration or data, overrides, options, progress)
    if dry_run:
        return QuantizeOutcome(result.coverage, result.predicted_bytes(), None, None)
    written = result.write(output, force)
    outcome = QuantizeOutcome(result.coverage, written.file_bytes, written, None)
    if not evaluate:
        return outcome
    # The result is measured as anyone will meet it: read back from its file.
    pairs = [(source, opened), (output, _open(output, arch, wanted, None))]
    options = replace(options, baseline=0)
    evaluation = _measure(pairs, arch, data, overrides, options, gates, on_note, progress)
    return replace(outcome, evaluation=evaluation)


@dataclass(frozen=True)
class _Product:
    """A quantized Program or state dict, ready to be written."""

    coverage: Coverage
    subject: Program | dict[str, Tensor]
    encodings: dict[str, Encoding]
    about: dict[str, Any]

    def predicted_bytes(self) -> int:
        if isinstance(self.subject, Program):
            return artifact.predicted_bytes(self.subject)
        return artifact.predicted_bytes(self.subject, self.encodings, **self.about)

    def write(self, output: str | Path, force: bool) -> "artifact.Written":
        if isinstance(self.subject, Program):
            return artifact.write_program(self.subject, Path(output), force=force)
        return artifact.write_tensors(self.subject, self.encodings, Path(output), force=force, **self.about)


def _open(path: str | Path, arch: str | None, wanted: InputSpec | None, on_note: Note | None) -> Opened:
    opened = open_source(path, arch, wanted)
    for note in opened.notes:
        if on_note is not None:
            on_note(note)
    return opened


def _quantized(
    opened: Opened,
    config: QuantizeConfig,
    data: str | None,
    overrides: PreprocessOverrides | None,
    options: EvalOptions,
    progress: StageProgress | None,
) -> _Product:
    origin = {"modelopt": modelopt_cli.__version__, "source_sha256": opened.source_sha256}
    if opened.program is None:
        linears = (
            {name for name, m in opened.module.named_modules() if isinstance(m, nn.Linear)}
            if opened.module is not None
            else None
        )
        return _tensor_product(apply_to_state(opened.state, config, linears), opened, config, options, origin)
    samples = None
    if data is not None and config.scheme == "int8":
        samples = open_data(data, input=opened.program.input, overrides=overrides, seed=options.seed)
        opened.program.input = samples.input
    context = Context(
        data=samples,
        seed=options.seed,
        batch_size=options.data_batch_size,
        workers=options.workers,
        progress=None if progress is None else lambda done, total: progress("calibrating", done, total),
        origin=origin,
    )
    program = METHODS["quantize"].apply(opened.program, config, context).program
    return _Product(coverage(program), program, {}, {})


def _tensor_product(
    result: TensorResult,
    opened: Opened,
    config: QuantizeConfig,
    options: EvalOptions,
    origin: dict[str, Any],
) -> _Product:
    covered = result.coverage
    entry = {
        "method": "quantize",
        "config": config.as_dict(),
        "seed": options.seed,
        "torch": str(torch.__version__),
        "skipped": result.skipped,
        "coverage": {"compressed": covered.compressed, "total": covered.total},
        **origin,
    }
    before = opened.tensors.history if opened.tensors is not None else ()
    architecture = opened.architecture
    about: dict[str, Any] = {"history": (*before, entry)}
    if architecture is not None:
        about |= {"arch": architecture.spec, "input": architecture.input, "labels": architecture.labels}
    return _Product(covered, result.state, result.encodings, about)


def _measure(
    pairs: Sequence[tuple[str | Path, Opened]],
    arch: str | None,
    data: str | None,
    overrides: PreprocessOverrides | None,
    options: EvalOptions,
    gates: Gates,
    on_note: Note | None,
    progress: StageProgress | None,
) -> Evaluation:
    subjects = [as_subject(path, opened, arch, options.device) for path, opened in pairs]
    known = next((subject.input for subject in subjects if subject.input is not None), None)
    samples: Data | None = None
    if data is not None:
        samples = open_data(data, input=known, overrides=overrides, seed=options.seed)
    evaluation = measure.evaluate(subjects, samples, options, progress)
    if samples is not None and on_note is not None and (note := _missing_classes(samples, evaluation)):
        on_note(note)
    return measure_gates.apply(evaluation, gates) if gates else evaluation


def _missing_classes(samples: Data, evaluation: Evaluation) -> str | None:
    """A warning where labels, which count the classes that the data happens to hold, may mean others."""
    named = len(samples.class_names or ())
    outputs = max((m.accuracy.classes or 0 for m in evaluation.models if m.accuracy is not None), default=0)
    if not samples.labelled or not 0 < named < outputs:
        return None
    return (
        f"{samples.name} has {named} classes, the network has {outputs}: "
        f"class {named - 1} of the network is taken to be '{(samples.class_names or ())[-1]}'"
    )
