"""The verb ``prune``, and the table of sensitivities it can start from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelopt_cli import artifact
from modelopt_cli.api.evaluating import measure_pairs
from modelopt_cli.api.fine_tuning import context_of, fine_tuner, given_to, origin_of
from modelopt_cli.api.gain import gain_notes
from modelopt_cli.api.guard import Given
from modelopt_cli.api.judging import after_writing, rehearse, require_apart
from modelopt_cli.api.opening import Note, input_of, noting_once, open_input, open_noting, without_graph
from modelopt_cli.api.product import Product, about_tensors
from modelopt_cli.api.tuning import Surroundings, Trainer, TrainingRequest
from modelopt_cli.artifact.coding import Code, require_code
from modelopt_cli.checkpoint import Opened, require_network
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import CaptureError, UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.context import Reached
from modelopt_cli.methods.prune.apply import sensitivity as measure_sensitivity
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.sensitivity import Sensitivity
from modelopt_cli.methods.prune.state_pruner import apply_to_state
from modelopt_cli.methods.prune.structures import ACCELERATED
from modelopt_cli.methods.prune.summary import PrunedLayer, summary, thin_notes
from modelopt_cli.methods.table import METHODS
from modelopt_cli.program.coverage import Coverage
from modelopt_cli.training.distributed import world


@dataclass(frozen=True)
class PruneOutcome:
    """What ``prune`` did.

    Attributes:
        coverage: every weight-carrying layer, with what became of it.
        layers: the same with the weights of each before and after.
        target: what was asked for and what was reached.
        notes: one line for each thing the user should know of the result.
        predicted_bytes: length of the file, known before it is written; after a dry run without the
            training that was asked for, what it would have before that training.
        written: the file; None after a dry run, or in a process that is not the main one of several.
        evaluation: source and result side by side, or None where nothing was measured.
    """

    coverage: Coverage
    layers: tuple[PrunedLayer, ...]
    target: Reached | None
    notes: tuple[str, ...]
    predicted_bytes: int
    written: artifact.Written | None
    evaluation: Evaluation | None


def prune(
    source: str | Path,
    output: str | Path,
    *,
    config: PruneConfig,
    training: TrainingRequest | None = None,
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
) -> PruneOutcome:
    """Prune a checkpoint into a file, fine-tune it on the way, and measure the two side by side.

    Args:
        source: a checkpoint or an artifact.
        output: the file to write; an existing one only with ``force``.
        config: what to prune, how far, by which criterion and schedule.
        training: the data to fine-tune on, how, and where to keep the state of an interrupted run; None
            does not train.
        arch: the architecture, where it is not recognised.
        data: what to evaluate on, and never to train or choose by.
        calibration: what criteria and batch norms look at; by default the training data, else ``data``.
        overrides: preprocessing the user wants instead of the implied one.
        options: how to measure, and the seed, threads, device and workers.
        gates: limits to apply to the result; the file stays even if one is not met.
        evaluate: whether to measure.
        code: how the file is written, a key of ``artifact.coding.CODINGS``; a target in bytes counts that.
        force: replace an existing output, and start over where an interrupted run is found.
        dry_run: plan, in one shot and without training; write and measure nothing.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: the source, the data, an option or the output cannot be used; nothing is written.
        GateNotMet: the target cannot be reached, or nothing can be pruned; nothing is written.
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
    if evaluate and config.criterion_row.needs_labels:
        what = f"criterion {config.chosen_criterion} reads the labels of"
        require_apart(calibration, data, what, input_of(opened))
    if evaluate and not dry_run:
        rehearse([opened], data, overrides, options, gates)
    how = Surroundings(overrides, options, force, progress, on_note=on_note)
    if dry_run:
        with threads(options.threads), without_graph(opened, on_note):
            made = _pruned(opened, _in_one_shot(config), calibration, None, how, code)
        covered, predicted = made.product.coverage, made.product.predicted_bytes(code)
        notes = made.notes + _on_zeros(config) + gain_notes(source, opened, covered, None, predicted)
        return PruneOutcome(covered, made.layers, made.target, notes, predicted, None, None)
    identity: dict[str, Any] = {"command": "prune", "source": opened.source_sha256, "arch": arch}
    identity |= {"config": config.as_dict(), "calibration": calibration, "code": code}
    with (
        threads(options.threads),
        without_graph(opened, on_note),
        fine_tuner(training, output, identity, opened, how) as tools,
    ):
        made = _pruned(opened, config, calibration, tools, how, code)
        main = world(options.device).main
        written = made.product.write(output, force, code) if main else None
        if tools is not None:
            tools.run.close()
    predicted = written.file_bytes if written is not None else made.product.predicted_bytes(code)
    # Measuring a Program says of its zeros what they do on the device.
    notes = made.notes if evaluate and opened.program else made.notes + _on_zeros(config)
    covered = made.product.coverage
    notes += gain_notes(source, opened, covered, output if written is not None else None, predicted)
    outcome = PruneOutcome(covered, made.layers, made.target, notes, predicted, written, None)
    if written is None or not evaluate:
        return outcome
    options = replace(options, baseline=0)
    with after_writing(output):
        # The result is measured as anyone will meet it: read back from its file.
        pairs = [(source, opened), (output, open_noting(output, arch, wanted, None))]
        looked_at = [calibration] if config.chosen_by_data else []
        evaluation = measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress, looked_at)
    return replace(outcome, evaluation=evaluation)


def sensitivity(
    source: str | Path,
    *,
    config: PruneConfig,
    arch: str | None = None,
    calibration: str,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure how much the answers of a network change when one part of it is pruned at a time.

    Args:
        source: a checkpoint or an artifact.
        config: what to prune by which criterion; it needs no target.
        arch: the architecture, where it is not recognised.
        calibration: the samples whose answers are compared; labels are not needed.
        overrides: preprocessing the user wants instead of the implied one.
        options: the seed, threads, device and workers.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: the source, the data or an option cannot be used, or the network cannot be traced.
        NothingCompressed: nothing can be pruned.
    """
    options, on_note = options or EvalOptions(), noting_once(on_note)
    require_device(options.device)
    wanted = open_input([source], arch, calibration, overrides)
    opened = open_noting(source, arch, wanted, on_note, overrides, graph=False)
    require_network(opened, source)
    if opened.program is None:
        raise CaptureError("sensitivity needs a graph", where=str(source), hint=opened.untraced)
    how = Surroundings(overrides, options, False, progress, on_note=on_note)
    context = context_of(opened, calibration, None, how, "pruning")
    with threads(options.threads):
        return measure_sensitivity(opened.program, config, context)


@dataclass(frozen=True)
class _Made:
    """A pruned network or state dict that is not written yet."""

    product: Product
    layers: tuple[PrunedLayer, ...]
    target: Reached | None
    notes: tuple[str, ...]


def _on_zeros(config: PruneConfig) -> tuple[str, ...]:
    if config.pattern is None:
        return ()
    fast = f"; {config.structure} is multiplied faster on CUDA" if config.pattern == ACCELERATED else ""
    return (f"zeros make the file smaller, and nothing faster on a CPU{fast}",)


def _in_one_shot(config: PruneConfig) -> PruneConfig:
    return replace(config, schedule=PruneConfig.schedule, rounds=PruneConfig.rounds)


def _pruned(
    opened: Opened,
    config: PruneConfig,
    calibration: str | None,
    tools: Trainer | None,
    how: Surroundings,
    code: Code,
) -> _Made:
    if opened.program is None:
        return _pruned_state(opened, config, how, code)
    before = dict(opened.program.state_dict())
    context = context_of(opened, calibration, tools, how, "pruning", code)
    given = given_to(opened, context)
    result = METHODS["prune"].apply(opened.program, config, context)
    product = Product.of_program(result.program, given)
    layers = summary(before, result.program.state_dict(), product.coverage)
    return _Made(product, layers, result.target, (*result.notes, *thin_notes(layers, result.target)))


def _pruned_state(opened: Opened, config: PruneConfig, how: Surroundings, code: Code) -> _Made:
    """What has no graph loses single weights, tensor by tensor."""
    encodings = opened.tensors.encodings if opened.tensors is not None else {}
    seed, state = how.options.seed, dict(opened.state)
    about = about_tensors(opened)
    origin = origin_of(opened, how.overrides)
    result = apply_to_state(state, encodings, config, seed, origin=origin, about=about, code=code)
    given = Given.of(opened, device=how.options.device)
    product = Product.of_tensors(opened, result.state, result.encodings, result.coverage, result.entry, given)
    layers = summary(state, result.state, result.coverage)
    return _Made(product, layers, result.target, thin_notes(layers, result.target))
