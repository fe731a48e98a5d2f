"""The methods that compress a model: one row of ``methods.method_table.METHODS`` at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from modelopt_cli.api.compressed import CompressedModel, about_tensors
from modelopt_cli.api.evaluating import Compared
from modelopt_cli.api.guard import Original
from modelopt_cli.api.notes import gain_notes, integer_training_note, loss_note, nan_note, signal_note
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.api.rehearsal import require_labels, require_other_samples, seen_in_training
from modelopt_cli.api.request import Request
from modelopt_cli.api.result import Result
from modelopt_cli.api.trainer import Trainer, names_of_classes, trainer
from modelopt_cli.api.work import Made, Work
from modelopt_cli.artifact import Written
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, open_data
from modelopt_cli.data.norm_samples import ForNetwork
from modelopt_cli.data.source import name_of
from modelopt_cli.errors import GraphNeeded
from modelopt_cli.methods.context import Context, MethodResult, Tensors, TensorsResult
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.program import Program
from modelopt_cli.program.parted import code_of
from modelopt_cli.settings import option


class Compressing(Work):
    """quantize, prune or share at work."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.method = METHODS[request.command]
        self.config = self.method.plan(request.config) if request.dry_run else request.config
        self.told: list[str] = []

    def open(self) -> None:
        """Open the model once, and keep calibration and judging apart where labels decide."""
        request = self.request
        assert request.source is not None
        file = ModelFile.of(request.source)
        self.known = known_input([file], request.arch, request.shown, request.preprocessing)
        self.opened = file.open(request.arch, self.known, request.on_note, request.preprocessing, graph=False)
        require_labels(request.samples, self.method.reads_labels(request.config))
        if request.evaluate and (reading := self.method.reads_labels(request.config)) is not None:
            require_other_samples(request.samples, request.data, reading, self.opened.input)
        measures_drop = self.method.meets_drop(request.config) and request.samples is not None
        if measures_drop and (line := seen_in_training(self.opened, request.samples)) is not None:
            request.note(line)

    def refuse_without_graph(self) -> None:
        """Refuse a choice of the method, or a training, that takes a graph."""
        request = self.request
        self.method.refuse_without_graph(self.config, self.opened.module is not None)
        if request.training is not None and not request.dry_run:
            hint = f"leave {option('epochs')} out"
            raise GraphNeeded("fine-tuning needs a network that can be traced", hint=hint)

    @contextmanager
    def training(self) -> Iterator[Trainer | None]:
        """A trainer where fine-tuning is asked for; a dry run plans without."""
        request, program = self.request, self.opened.program
        if request.training is None or request.dry_run:
            yield None
            return
        assert program is not None
        identity = {
            "command": request.command,
            "source": self.opened.source_sha256,
            "arch": request.arch,
            "config": request.config.as_dict(),
            "calibration": name_of(request.samples),
            "code": request.code,
        }
        with trainer(request, identity, program.input, self.opened.labels, task=self.task) as tools:
            # Labels were counted by these names, so the result is to be judged by them.
            tools.run.network = code_of(program)
            program.labels = program.labels or names_of_classes(program, tools.training.train)
            yield tools

    def make(self, trainer: Trainer | None) -> Made:
        """Apply the method, with or without a graph."""
        context, program = self.context(trainer, self.method.stage), self.opened.program
        if program is None:
            return self._made_of_tensors(context)
        context = replace(context, data=self.samples(trainer))
        original = self.original(context)
        result = self.method.apply(program, self.config, context)
        model = CompressedModel.of_program(result.program, original)
        return self._result(model, original, program, result.program, result)

    def _made_of_tensors(self, context: Context) -> Made:
        opened, apply = self.opened, self.method.apply_to_tensors
        assert apply is not None
        original = self.original(context)
        tensors = Tensors(opened.state, opened.encodings, opened.module, about_tensors(opened))
        result = apply(tensors, self.config, context)
        model = CompressedModel.of_tensors(opened, result, original)
        return self._result(model, original, tensors, result, result)

    def _result(
        self,
        model: CompressedModel,
        original: Original,
        before: Any,
        after: Any,
        result: MethodResult | TensorsResult,
    ) -> Made:
        request, method, covered = self.request, self.method, model.coverage
        usual, trained = method.signal(self.config), _integer_training(after)
        snr_db = model.checked.snr_db if usual is not None else None
        if snr_db is not None and usual is not None:
            model = model.recording(snr_db=round(snr_db, 1))
            if snr_db < usual.least_db:
                fall = original.steepest_fall(model.checked)
                self.tell(loss_note(snr_db, usual, fall, trained=trained is not None))
        layers = method.layers(before, after, covered, self.config)
        measured = request.evaluate and not request.dry_run and self.opened.program is not None
        notes = (
            *getattr(result, "notes", ()),
            *([] if trained is None else [integer_training_note(trained)]),
        )
        notes += method.notes(self.config, layers, result.target, measured)
        if snr_db is not None and request.dry_run and request.training is not None:
            notes += ("a dry run does not train: the signal to noise is that before training",)
        if usual is not None and original.nan_share:
            notes += (nan_note(original.nan_share),)
        return Made(
            model,
            Result(request.command, covered, layers, result.target, notes, tuple(self.told), snr_db=snr_db),
        )

    def tell(self, line: str) -> None:
        """Say at once what the result says, too."""
        self.told.append(line)
        self.request.note(line)

    def finish(self, made: Made, written: Written | None) -> Result:
        """The result with its size, and what was gained."""
        size = made.model.predicted_bytes(self.request.code) if written is None else written.file_bytes
        gained = gain_notes(self.opened, made.model.coverage, written, size, self.method.remedy(self.config))
        notes = (*made.result.notes, *gained, *signal_note(made.result.snr_db))
        return replace(made.result, notes=notes, predicted_bytes=size, written=written)

    def samples(self, trainer: Trainer | None) -> Data | None:
        """Calibration data, whose preprocessing the file will record."""
        request, program = self.request, self.opened.program
        assert program is not None
        spec = request.samples
        if spec is None or not self.method.reads_data(self.config):
            return None
        training = request.training
        if trainer is not None and training is not None and training.train == spec:
            samples = trainer.training.train
        else:
            samples = open_data(
                spec,
                input_spec=program.input,
                overrides=request.preprocessing,
                seed=request.options.seed,
                labels=False,
                network=self.for_network(program),
            )
            for note in samples.notes:
                self.tell(note)
        program.input = program.input.with_samples_of(samples.input)
        return samples

    def for_network(self, program: Program) -> ForNetwork:
        """The network that samples to calibrate on are learned from, where none are given."""
        request = self.request
        return ForNetwork(
            program,
            most=getattr(self.config, "calibration_samples", None),
            instead=self.method.without_samples(),
            device=request.options.device,
            progress=partial(request.progress, "learning samples") if request.progress is not None else None,
        )

    def compared(self, outputs: list[tuple[Any, Opened]]) -> tuple[Compared, Request]:
        """The model as it was, and as it is now."""
        fitted = self.opened.program is not None and self.method.fits_data(self.config)
        calibrated_on = [self.request.samples] if fitted else []
        models = [(self.opened.path, self.opened), *outputs]
        return Compared(models, calibrated_on, self.request.trained_on), self.request


def _integer_training(after: Any) -> dict[str, Any] | None:
    """The entry of the history that says how a network just quantized was trained; None where it was not."""
    entry: dict[str, Any] = after.history[-1] if isinstance(after, Program) else {}
    return entry if "trained" in entry else None
