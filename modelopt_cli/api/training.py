"""The verb ``train``."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modelopt_cli
from modelopt_cli import artifact
from modelopt_cli.api.doubts import other_classes
from modelopt_cli.api.evaluating import measure_pairs
from modelopt_cli.api.guard import Given
from modelopt_cli.api.judging import after_writing, rehearse
from modelopt_cli.api.opening import (
    Note,
    labels_of,
    noting_once,
    open_input,
    open_noting,
    sample_of,
    tell_notes,
)
from modelopt_cli.api.planning import Plan, cost_of
from modelopt_cli.api.product import Product
from modelopt_cli.api.tuning import Surroundings, Trainer, TrainingRequest, names_of_classes, trainer
from modelopt_cli.artifact.encodings import compact, compact_state, require_not_shared
from modelopt_cli.checkpoint import Opened, fresh_model, require_network
from modelopt_cli.data import Data, PreprocessOverrides
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure import gates as measure_gates
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.coverage import Coverage
from modelopt_cli.training import Trained, Training, fit

STAGE = "train"


@dataclass(frozen=True)
class TrainOutcome:
    """What ``train`` did.

    Attributes:
        trained: how training went; after a dry run, of no step.
        written: the file; None after a dry run and in a process that is not the main one of several.
        evaluation: checkpoint and result side by side, or None where nothing was measured.
        plan: what it would take, after a dry run alone.
    """

    trained: Trained
    written: artifact.Written | None
    evaluation: Evaluation | None
    plan: Plan | None = None


def train(
    source: str | Path | None,
    output: str | Path,
    *,
    training: TrainingRequest,
    arch: str | None = None,
    data: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    evaluate: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> TrainOutcome:
    """Train a network into a file, from scratch or from a checkpoint, and measure it.

    Args:
        source: a checkpoint or an artifact to start from; None starts from random weights, drawn from
            ``options.seed``.
        output: the file to write; an existing one only with ``force``.
        training: the data to train on, how, and where to keep the state of an interrupted run.
        arch: the architecture, where there is no checkpoint or it is not recognised.
        data: what to evaluate on, and never to train or choose by.
        overrides: preprocessing the user wants instead of the implied one.
        options: how to measure, and the seed, threads, device and workers.
        gates: limits to apply to the result, compared with ``source``.
        evaluate: whether to measure.
        force: replace an existing output, and start over where an interrupted run is found.
        dry_run: check everything, time a few steps, and write, train and measure nothing.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: the source, the data, an option or the output cannot be used; nothing is written.
        EnvironmentFailure: no space, no permission, an optional package.
    """
    options, gates, on_note = options or EvalOptions(), gates or Gates(), noting_once(on_note)
    require_device(options.device)
    sources = [source] if source is not None else []
    _check(source, arch, training, data, gates, evaluate)
    artifact.check_suffix(output)
    artifact.check_output(output, force, sources)
    training.require_apart(output, sources)
    wanted = open_input(sources, arch, training.train, overrides)
    opened = _start(source, arch, wanted, overrides, options.seed, on_note)
    sample = sample_of(opened, source or arch or "")
    labels = labels_of(opened) if source is not None else None

    rehearsed = partial(rehearse, [opened], data, overrides, options, gates)

    def check(train: Data) -> None:
        if on_note is not None and (note := other_classes(opened.program, train)):
            on_note(note)
        rehearsed(labels=train.class_names or labels)

    identity = {"command": "train", "source": opened.source_sha256, "arch": arch}
    how = Surroundings(overrides, options, force, progress, dry_run, on_note)
    with (
        threads(options.threads),
        trainer(training, output, identity, sample, how, labels, check, adopt=True) as tools,
    ):
        trained, product = _trained(opened, tools, options.seed)
        if dry_run:
            plan = _plan(opened, source or arch or "", tools.training, product)
            return TrainOutcome(trained, None, None, plan)
        written = product.write(output, force) if tools.world.main else None
        tools.run.close()
    outcome = TrainOutcome(trained, written, None)
    if written is None or not evaluate:
        return outcome
    options = replace(options, baseline=0)
    with after_writing(output):
        pairs = [(path, open_noting(path, arch, wanted, None)) for path in (*sources, output)]
        last = len(sources)
        found = measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress, named_by=last)
    return replace(outcome, evaluation=found)


def _check(
    source: str | Path | None,
    arch: str | None,
    training: TrainingRequest,
    data: str | None,
    gates: Gates,
    evaluate: bool,
) -> None:
    """Refuse what would only be found out after training."""
    if source is None and arch is None:
        raise UsageError("nothing to train", hint="name a checkpoint, or an architecture with --arch")
    if training.config.teacher is not None:
        raise UsageError("has no meaning in train", where="--teacher", hint="it is for prune")
    if gates and not evaluate:
        raise UsageError("a gate needs the result to be measured", hint="leave out --no-eval or the gate")
    measure_gates.require_comparable(gates, 1 if source is None else 2)
    training.require_fair(data)


def _start(
    source: str | Path | None,
    arch: str | None,
    wanted: InputSpec | None,
    overrides: PreprocessOverrides | None,
    seed: int,
    on_note: Note | None,
) -> Opened:
    """The checkpoint, or fresh random weights."""
    if source is not None:
        opened = open_noting(source, arch, wanted, on_note, overrides)
        require_network(opened, source)
        return opened
    assert arch is not None
    opened = fresh_model(arch, wanted, seed)
    tell_notes(opened, on_note, overrides)
    return opened


def _trained(opened: Opened, tools: Trainer, seed: int) -> tuple[Trained, Product]:
    """The network after training; weights that were pruned stay zero."""
    network: nn.Module = opened.program or opened.module  # type: ignore[assignment]
    tensors = opened.tensors
    encodings = opened.program.encodings if opened.program else tensors.encodings if tensors else {}
    require_not_shared(encodings)
    masks = Masks.of_state(network.state_dict(), encodings)
    given = Given.of(opened, data=tools.training.train, seed=seed, device=tools.training.device)
    trained = fit(network, tools.training, seed=seed, stage=STAGE, companions=[masks])
    entry = history_entry(opened, tools.training, trained, seed)
    if isinstance(network, Program):
        network.input = tools.training.train.input
        network.labels = names_of_classes(network, tools.training.train)
        network.encodings = compact(network)
        network.history = (*network.history, entry)
        return trained, Product.of_program(network, given)
    state = dict(network.state_dict())
    stored = compact_state(state, encodings)
    return trained, Product.of_tensors(opened, state, stored, Coverage(()), entry, given)


def _plan(opened: Opened, start: str | Path, training: Training, product: Product) -> Plan:
    """What was forecast, and what the network costs; ``start`` is its file or its architecture."""
    name = Path(start).name if opened.source_sha256 else str(start)
    network = require_network(opened, start)
    input = training.train.input
    costs = [cost_of("network", name, network, input.shape, input.dtype)]
    return Plan(costs, training.forecasts or (), product.predicted_bytes())


def history_entry(opened: Opened, training: Training, trained: Trained, seed: int) -> dict[str, Any]:
    """What the history says: nothing that would differ from one run to the next."""
    entry: dict[str, Any] = {
        "method": "train",
        "config": training.config.as_dict(),
        "seed": seed,
        "torch": str(torch.__version__),
        "modelopt": modelopt_cli.__version__,
        "data": training.train.name,
        "skipped": {},
        **trained.figures,
    }
    if training.val is not None:
        entry["validation"] = training.val.name
    if opened.source_sha256:
        entry["source_sha256"] = opened.source_sha256
    return entry
