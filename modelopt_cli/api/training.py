"""``train`` at work: a network is trained from a checkpoint, or from random weights."""

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelopt_cli.api.compressed import CompressedModel
from modelopt_cli.api.doubts import other_classes
from modelopt_cli.api.evaluating import Compared
from modelopt_cli.api.guard import Original
from modelopt_cli.api.notes import training_note
from modelopt_cli.api.opening import ModelFile, known_input, sample_of, tell_notes, told_if_slow
from modelopt_cli.api.preprocessing_notes import PREPROCESSING
from modelopt_cli.api.rehearsal import rehearse
from modelopt_cli.api.request import Request
from modelopt_cli.api.result import Result
from modelopt_cli.api.trainer import Trainer, names_of_classes, trainer
from modelopt_cli.api.work import Made, Work, origin_of
from modelopt_cli.artifact.encodings import compact, compact_state, require_not_shared
from modelopt_cli.checkpoint import Opened, as_built, fresh_model, require_network
from modelopt_cli.data import Data
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import gates as measure_gates
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import TensorsResult
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.program import Program
from modelopt_cli.program.history import history_entry
from modelopt_cli.report.dry_run import Plan, cost_of
from modelopt_cli.settings import option
from modelopt_cli.training import Trained, Training, fit
from modelopt_cli.training.objectives import returns_losses

STAGE = "train"


class TrainingWork(Work):
    """train at work."""

    always_trains = True

    def check(self) -> None:
        """Refuse what would only be found out after training."""
        request = self.request
        if request.source is None and request.arch is None:
            raise UsageError(
                "nothing to train", hint=f"name a checkpoint, or an architecture with {option('arch')}"
            )
        if request.training is None:
            raise UsageError("nothing to train on", hint=f"give {option('train')}")
        if request.training.config.teacher is not None:
            raise UsageError("has no meaning in train", where=option("teacher"), hint="it is for prune")
        measure_gates.require_comparable(request.gates, 1 if request.source is None else 2)

    def open(self) -> None:
        """The checkpoint, or fresh random weights."""
        request = self.request
        assert request.training is not None
        files = [ModelFile.of(path) for path in self.sources]
        self.known = known_input(files, request.arch, request.training.train, request.preprocessing)
        self.before: list[tuple[str | Path, Opened]] = []
        for file in files:
            self.opened = file.open(request.arch, self.known, request.on_note, request.preprocessing)
            require_network(self.opened, file.path)
            if request.evaluate:
                self.before = [(file.path, _copy(self.opened))]  # training changes the network in place
        if not files:
            assert request.arch is not None
            with told_if_slow(f"building {request.arch}", request.on_note):
                self.opened = fresh_model(request.arch, self.known, request.options.seed)
            tell_notes(self.opened, request.on_note, request.preprocessing)

    def settle_task(self) -> None:
        """Choose the task. A network that computes its losses itself is trained as it was built."""
        super().settle_task()
        if returns_losses(self.task.spec):
            self.opened = as_built(self.opened)

    def rehearse(self) -> None:
        """Rehearse nothing yet: the training data say which classes there are."""

    def training(self) -> AbstractContextManager[Trainer]:
        """A trainer that adopts the classes of the training data where they are others."""
        request, opened = self.request, self.opened
        labels = opened.labels if request.source is not None else None

        def check(train: Data) -> None:
            if (note := other_classes(opened.program, train)) is not None:
                request.note(note)
            rehearse([opened], request, labels=train.class_names or labels, task=self.task)

        identity = {"command": "train", "source": opened.source_sha256, "arch": request.arch}
        sample = sample_of(opened, request.source or request.arch or "")
        return trainer(request, identity, sample, labels, check, adopt=True, task=self.task)

    def make(self, trainer: Trainer | None) -> Made:
        """Train in place; weights that were pruned stay zero."""
        assert trainer is not None
        opened, training, seed = self.opened, trainer.training, self.request.options.seed
        network = require_network(opened, self.request.source or "")
        require_not_shared(opened.encodings)
        masks = Masks.of_state(network.state_dict(), opened.encodings)
        original = Original.of(opened, data=training.train, seed=seed, device=training.device)
        trained = fit(network, training, seed=seed, stage=STAGE, callbacks=[masks])
        entry = training_entry(self, training, trained)
        if isinstance(network, Program):
            network.input = network.input.with_samples_of(training.train.input)
            network.labels = names_of_classes(network, training.train)
            network.encodings = compact(network)
            network.history = (*network.history, entry)
            model = CompressedModel.of_program(network, original)
        else:
            state = dict(network.state_dict())
            stored = compact_state(state, opened.encodings)
            model = CompressedModel.of_tensors(
                opened, TensorsResult(state, Coverage(()), entry, stored), original
            )
        if self.request.dry_run:
            return Made(model, Result("train", plan=self._plan(training, model)))
        return Made(model, Result("train", trained=trained, notes=(training_note(trained),)))

    def _plan(self, training: Training, model: CompressedModel) -> Plan:
        """The time estimate, and what the network costs; its name is that of its file or architecture."""
        start, sample = self.request.source or self.request.arch or "", training.train.input
        name = Path(start).name if self.opened.source_sha256 else str(start)
        network = require_network(self.opened, start)
        costs = [cost_of("network", name, network, sample)]
        return Plan(costs, training.estimates or (), model.predicted_bytes())

    def compared(self, outputs: list[tuple[Any, Opened]]) -> tuple[Compared, Request]:
        """The checkpoint as it was, and the result, whose classes count."""
        return Compared(
            [*self.before, *outputs], trained_on=self.request.trained_on, named_by=len(self.before)
        ), self.request


def _copy(opened: Opened) -> Opened:
    return replace(opened, program=copy.deepcopy(opened.program), module=copy.deepcopy(opened.module))


def training_entry(work: Work, training: Training, trained: Trained) -> dict[str, Any]:
    """Entry in the history: nothing that would differ from one run to the next."""
    opened, request = work.opened, work.request
    figures: dict[str, Any] = {"data": training.train.name, **trained.figures}
    if training.val is not None:
        figures["validation"] = training.val.name
    origin = {
        name: value for name, value in origin_of(opened, request).items() if value and name != PREPROCESSING
    } | work.task.history
    settings, seed = training.config.as_dict(), request.options.seed
    return history_entry("train", settings, seed=seed, origin=origin, **figures)
