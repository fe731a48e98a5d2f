"""The verb ``share``."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelopt_cli import artifact
from modelopt_cli.api.evaluating import measure_pairs
from modelopt_cli.api.fine_tuning import context_of, fine_tuner, given_to, origin_of
from modelopt_cli.api.gain import gain_notes
from modelopt_cli.api.guard import Given
from modelopt_cli.api.judging import after_writing, rehearse, require_apart, seen_in_training
from modelopt_cli.api.opening import Note, input_of, noting_once, open_input, open_noting, without_graph
from modelopt_cli.api.product import Product
from modelopt_cli.api.tuning import Surroundings, Trainer, TrainingRequest
from modelopt_cli.artifact.coding import Code, require_code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.share.apply import apply_to_state
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.shared_layers import SharedLayer, summary
from modelopt_cli.methods.table import METHODS
from modelopt_cli.program.coverage import Coverage, recorded
from modelopt_cli.training.distributed import world


@dataclass(frozen=True)
class ShareOutcome:
    """What ``share`` did.

    Attributes:
        coverage: every weight-carrying layer, with what became of it.
        layers: how many values each has, and what they cost; empty where there is no graph, and tensors
            are made one at a time.
        target: the budget and what was reached, for ``bits="auto"``.
        predicted_bytes: length of the file, known before it is written.
        written: the file; None after a dry run, or in a process that is not the main one of several.
        evaluation: source and result side by side, or None where nothing was measured.
        notes: one line for each thing the user should know of the result.
    """

    coverage: Coverage
    layers: tuple[SharedLayer, ...]
    target: Reached | None
    predicted_bytes: int
    written: artifact.Written | None
    evaluation: Evaluation | None
    notes: tuple[str, ...] = ()


def share(
    source: str | Path,
    output: str | Path,
    *,
    config: ShareConfig,
    training: TrainingRequest | None = None,
    arch: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    evaluate: bool = True,
    code: Code = "entropy",
    force: bool = False,
    dry_run: bool = False,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> ShareOutcome:
    """Share the weights of a checkpoint, fine-tune them, write a file, and measure the two side by side.

    Args:
        source: a checkpoint or an artifact.
        output: the file to write; an existing one only with ``force``.
        config: how many values, by what measure, or the budget to meet.
        training: the data to fine-tune on, how, and where to keep the state of an interrupted run; None
            does not train.
        arch: the architecture, where it is not recognised.
        data: what to evaluate on, and never to train or choose by.
        calibration: what weightings and budgets look at; by default the training data, else ``data``.
        overrides: preprocessing the user wants instead of the implied one.
        options: how to measure, and the seed, threads, device and workers.
        gates: limits to apply to the result; the file stays even if one is not met.
        evaluate: whether to measure.
        code: how the file is written, a key of ``artifact.coding.CODINGS``; a budget in bytes counts that.
        force: replace an existing output, and start over where an interrupted run is found.
        dry_run: share without training; write and measure nothing.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: the source, the data, an option or the output cannot be used; nothing is written.
        GateNotMet: the budget cannot be met, or nothing can be shared; nothing is written.
        EnvironmentFailure: no space, no permission, an optional package.
    """
    options, gates, on_note = options or EvalOptions(), gates or Gates(), noting_once(on_note)
    require_device(options.device)
    require_code(code)
    if gates and not evaluate:
        raise UsageError("a gate needs the result to be measured", hint="leave out --no-eval or the gate")
    if training is not None:
        training.require_fair(data)
        training.require_apart(output, [source])
    artifact.check_suffix(output)
    if not dry_run:
        artifact.check_output(output, force, [source])
    calibration = calibration or (training.train if training is not None else data)
    wanted = open_input([source], arch, calibration, overrides)
    opened = open_noting(source, arch, wanted, on_note, overrides, graph=False)
    if evaluate and config.chooses_on_data:
        require_apart(calibration, data, "--max-drop is measured on", input_of(opened))
    if config.chooses_on_data and calibration is not None and (line := seen_in_training(opened, calibration)):
        on_note(line)
    if evaluate and not dry_run:
        rehearse([opened], data, overrides, options, gates)
    how = Surroundings(overrides, options, force, progress, on_note=on_note)
    identity: dict[str, Any] = {"command": "share", "source": opened.source_sha256, "arch": arch}
    identity |= {"config": config.as_dict(), "calibration": calibration, "code": code}
    asked = None if dry_run else training
    with (
        threads(options.threads),
        without_graph(opened, on_note),
        fine_tuner(asked, output, identity, opened, how) as tools,
    ):
        made = _shared(opened, config, calibration, tools, how, code)
        main = not dry_run and world(options.device).main
        written = made.product.write(output, force, code) if main else None
        if tools is not None:
            tools.run.close()
    predicted = written.file_bytes if written is not None else made.product.predicted_bytes(code)
    covered = made.product.coverage
    notes = gain_notes(source, opened, covered, output if written is not None else None, predicted)
    outcome = ShareOutcome(covered, made.layers, made.target, predicted, written, None, notes)
    if written is None or not evaluate:
        return outcome
    options = replace(options, baseline=0)
    with after_writing(output):
        # The result is measured as anyone will meet it: read back from its file.
        pairs = [(source, opened), (output, open_noting(output, arch, wanted, None))]
        looked_at = [calibration] if config.looks_at_data else []
        evaluation = measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress, looked_at)
    return replace(outcome, evaluation=evaluation)


@dataclass(frozen=True)
class _Made:
    """A network or state dict with shared weights that is not written yet."""

    product: Product
    layers: tuple[SharedLayer, ...]
    target: Reached | None


def _shared(
    opened: Opened,
    config: ShareConfig,
    calibration: str | None,
    tools: Trainer | None,
    how: Surroundings,
    code: Code,
) -> _Made:
    if opened.program is None:
        return _shared_state(opened, config, how)
    context = context_of(opened, calibration, tools, how, "sharing", code)
    given = given_to(opened, context)
    result = METHODS["share"].apply(opened.program, config, context)
    product = Product.of_program(result.program, given)
    before, after = weights_of(opened.program), weights_of(result.program)
    layers = summary(before, after, product.coverage, comparable=not config.folds)
    return _Made(product, layers, result.target)


def _shared_state(opened: Opened, config: ShareConfig, how: Surroundings) -> _Made:
    """What has no graph is shared tensor by tensor, while it is written."""
    earlier = opened.tensors.encodings if opened.tensors is not None else {}
    progress = None if how.progress is None else partial(how.progress, "sharing")
    seed, has_network = how.options.seed, opened.module is not None
    result = apply_to_state(opened.state, config, seed, earlier, progress, has_network=has_network)
    covered = result.coverage
    entry = {
        "method": "share",
        "config": config.as_dict(),
        "seed": seed,
        "torch": str(torch.__version__),
        "skipped": result.skipped,
        **recorded(covered),
        **origin_of(opened, how.overrides),
    }
    given = Given.of(opened, device=how.options.device)
    return _Made(Product.of_stream(opened, result.stream, covered, entry, given), (), None)
