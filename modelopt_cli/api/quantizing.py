"""The verb ``quantize``."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelopt_cli import artifact
from modelopt_cli.api.evaluating import measure_pairs
from modelopt_cli.api.fine_tuning import given_to, origin_of
from modelopt_cli.api.gain import gain_notes
from modelopt_cli.api.guard import Given
from modelopt_cli.api.judging import after_writing, rehearse
from modelopt_cli.api.opening import Note, noting_once, open_input, open_noting, without_graph
from modelopt_cli.api.product import Product
from modelopt_cli.artifact.coding import Code, require_code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure.latency import threads
from modelopt_cli.measure.walk import Fall
from modelopt_cli.methods.context import Context, Progress
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.schemes import SCHEMES, Scheme, Source, usable
from modelopt_cli.methods.quantize.state_dict import TensorResult, apply_to_state
from modelopt_cli.methods.table import METHODS
from modelopt_cli.program.coverage import Coverage, recorded


@dataclass(frozen=True)
class QuantizeOutcome:
    """What ``quantize`` did.

    Attributes:
        coverage: every weight-carrying layer, with what became of it.
        predicted_bytes: length of the file, known before it is written.
        written: the file, or None after a dry run.
        evaluation: source and result side by side, or None where nothing was measured.
        snr_db: signal-to-noise of the outputs against the source's, in dB, on a few samples of the
            calibration data or of noise; None where there is no network.
        notes: one line for each thing the user should know of the result.
    """

    coverage: Coverage
    predicted_bytes: int
    written: artifact.Written | None
    evaluation: Evaluation | None
    snr_db: float | None = None
    notes: tuple[str, ...] = ()


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
    code: Code = "plain",
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
        code: how the file is written, a key of ``artifact.coding.CODINGS``.
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
    on_note = noting_once(on_note)
    require_device(options.device)
    require_code(code)
    if gates and not evaluate:
        raise UsageError("a gate needs the result to be measured", hint="leave out --no-eval or the gate")
    artifact.check_suffix(output)
    if not dry_run:
        artifact.check_output(output, force, [source])
    wanted = open_input([source], arch, calibration or data, overrides)
    opened = open_noting(source, arch, wanted, on_note, overrides, graph=False)
    judged = partial(rehearse, [opened], data, overrides, options, gates)
    runs = opened.program is not None or opened.module is not None
    of_any = usable(Source.TENSORS)
    remedy = "" if config.scheme in of_any else f"--scheme {' or '.join(of_any)} serves layers of any kind"
    if evaluate and not dry_run and runs:
        judged()
    with threads(options.threads), without_graph(opened, on_note):
        given, made = _quantized(opened, config, calibration or data, overrides, options, on_note, progress)
        snr_db = made.held.snr_db
        if snr_db is not None:
            made = made.recording(snr_db=round(snr_db, 1))
            if snr_db < (scheme := SCHEMES[config.scheme]).least_snr_db:
                on_note(_loss(snr_db, scheme, given.steepest_fall(made.held)))
        # What has no network is quantized only now, while it is written.
        if dry_run:
            predicted = made.predicted_bytes(code)
            notes = (*gain_notes(source, opened, made.coverage, None, predicted, remedy), *_kept(snr_db))
            return QuantizeOutcome(made.coverage, predicted, None, None, snr_db, notes)
        if evaluate and not runs:
            judged()  # after what a scheme needs, which says more
        written = made.write(output, force, code)
    notes = (*gain_notes(source, opened, made.coverage, output, written.file_bytes, remedy), *_kept(snr_db))
    outcome = QuantizeOutcome(made.coverage, written.file_bytes, written, None, snr_db, notes)
    if not evaluate:
        return outcome
    options = replace(options, baseline=0)
    looked_at = [calibration or data] if calibrates(opened, config) else []
    with after_writing(output):
        # The result is measured as anyone will meet it: read back from its file.
        pairs = [(source, opened), (output, open_noting(output, arch, wanted, None))]
        evaluation = measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress, looked_at)
    return replace(outcome, evaluation=evaluation)


def calibrates(opened: Opened, config: QuantizeConfig) -> bool:
    """True if the scheme looks at samples."""
    return opened.program is not None and SCHEMES[config.scheme].needs_calibration


def _quantized(
    opened: Opened,
    config: QuantizeConfig,
    data: str | None,
    overrides: PreprocessOverrides | None,
    options: EvalOptions,
    on_note: Note,
    progress: StageProgress | None,
) -> tuple[Given, Product]:
    origin = origin_of(opened, overrides)
    if opened.program is None:
        layers = None if opened.module is None else dict(opened.module.named_modules())
        earlier = opened.tensors.encodings if opened.tensors is not None else {}
        given = Given.of(opened, device=options.device)
        result = apply_to_state(opened.state, config, layers, earlier, _stage(progress, "quantizing"))
        return given, _tensor_product(result, opened, config, options, origin, given)
    samples = None
    if data is not None and calibrates(opened, config):
        known, seed = opened.program.input, options.seed
        samples = open_data(data, input=known, overrides=overrides, seed=seed, labels=False)
        for note in samples.notes:
            on_note(note)
        opened.program.input = samples.input
    context = Context(
        data=samples,
        seed=options.seed,
        batch_size=options.data_batch_size,
        workers=options.workers,
        progress=_stage(progress, "calibrating"),
        origin=origin,
        device=options.device,
    )
    given = given_to(opened, context)
    program = METHODS["quantize"].apply(opened.program, config, context).program
    return given, Product.of_program(program, given)


def _kept(snr_db: float | None) -> tuple[str, ...]:
    """The line that says how much of the outputs is left."""
    return () if snr_db is None else (f"outputs keep {snr_db:.1f} dB of signal to noise",)


def _loss(snr_db: float, scheme: Scheme, fall: Fall | None) -> str:
    """A warning that the outputs are not those of the source, and what to try."""
    usual = f"{scheme.weight_bits} bits keep {scheme.least_snr_db:g}"
    line = f"warning: the outputs keep {snr_db:.1f} dB of signal to noise, where {usual}"
    if fall is None:
        return f"{line}; try another --observer, or leave layers out with --exclude"
    drop = f"from {fall.before:.1f} to {fall.after:.1f} dB"
    line += f"; it falls {drop} after layer {fall.layer}"
    return f"{line}: leave that out with --exclude, or try another --observer"


def _tensor_product(
    result: TensorResult,
    opened: Opened,
    config: QuantizeConfig,
    options: EvalOptions,
    origin: dict[str, Any],
    given: Given,
) -> Product:
    covered = result.coverage
    entry = {
        "method": "quantize",
        "config": config.as_dict(),
        "seed": options.seed,
        "torch": str(torch.__version__),
        "skipped": result.skipped,
        **recorded(covered),
        **origin,
    }
    return Product.of_stream(opened, result.stream, covered, entry, given)


def _stage(progress: StageProgress | None, name: str) -> Progress | None:
    return None if progress is None else partial(progress, name)
