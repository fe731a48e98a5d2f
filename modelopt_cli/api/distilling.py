"""``distill`` at work: a student learns from teachers."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelopt_cli.api.compressed import CompressedModel
from modelopt_cli.api.evaluating import Compared
from modelopt_cli.api.guard import Original
from modelopt_cli.api.notes import distillation_notes
from modelopt_cli.api.opening import ModelFile, known_input, sample_of
from modelopt_cli.api.rehearsal import rehearse
from modelopt_cli.api.request import Request, Student
from modelopt_cli.api.result import Result
from modelopt_cli.api.students import learned_output, open_student
from modelopt_cli.api.teachers import (
    TeacherFile,
    comparable,
    leave_out,
    members_of,
    require_same_names,
    require_same_outputs,
)
from modelopt_cli.api.trainer import Trainer, names_of_classes, trainer
from modelopt_cli.api.training import training_entry
from modelopt_cli.api.work import Made, Work, origin_of
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.artifact.encodings import compact, compact_state, require_not_shared
from modelopt_cli.artifact.output_path import scratch_beside
from modelopt_cli.checkpoint import Opened, require_network
from modelopt_cli.errors import GraphNeeded, UsageError
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import Context, TensorsResult
from modelopt_cli.methods.distill.apply import learn, training_of
from modelopt_cli.methods.distill.cache import CacheRequest
from modelopt_cli.methods.distill.cache_identity import layout_of, require_cacheable, teachers_identity
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Program
from modelopt_cli.report.dry_run import Plan, cost_of
from modelopt_cli.settings import option
from modelopt_cli.training import AUGMENTATIONS, fit

SCRATCH = "scratch"


class Distilling(Work):
    """distill at work; ``opened`` is the student."""

    always_trains = True
    teachers: list[TeacherFile]

    @property
    def student(self) -> Student:
        """The student that is asked for."""
        assert self.request.student is not None
        return self.request.student

    @property
    def sources(self) -> list[str | Path]:
        """The files of teachers and student."""
        assert self.request.source is not None
        own = [self.student.spec] if Path(self.student.spec).exists() else []
        return [self.request.source, *(path for path, _ in self.student.also), *own]

    @property
    def outputs(self) -> list[Path]:
        """The student, after the one that learned without a teacher."""
        output = Path(self.request.output)
        return [scratch_beside(output), output] if self.student.compare_scratch else [output]

    def check(self) -> None:
        """Refuse what would only be found out after training."""
        training = self.request.training
        if training is None:
            raise UsageError("distill trains the student", hint=f"give {option('train')}")
        if self.student.cache is not None:
            drawn = AUGMENTATIONS[training.config.augment].is_random
            require_cacheable(self.request.config, training.config, drawn=drawn)

    def open(self) -> None:
        """Teachers and student."""
        request, student = self.request, self.student
        assert request.source is not None
        assert request.training is not None
        first = ModelFile.of(request.source)
        self.known = known_input([first], request.arch, request.training.train, request.preprocessing)
        files = [(first, 1.0), *((ModelFile.of(path), weight) for path, weight in student.also)]
        self.teachers = [
            TeacherFile(
                file.path,
                file.open(request.arch, self.known, request.on_note, request.preprocessing),
                weight,
            )
            for file, weight in files
        ]
        context = Context(seed=request.options.seed)
        self.opened = open_student(
            student.spec, student.arch, self.teachers[0].opened, context, request.on_note
        )
        self.sample = sample_of(self.opened, student.spec)

    def refuse_without_graph(self) -> None:
        """Refuse what takes the graph of a student."""
        wanted = {
            "finetune_epochs": self.request.config.finetune_epochs,
            "compare_scratch": self.student.compare_scratch,
        }
        for name in (name for name, value in wanted.items() if value):
            raise GraphNeeded("needs a student that can be traced", where=option(name))

    @property
    def models(self) -> list[Opened]:
        """Teachers and student."""
        return [*(each.opened for each in self.teachers), self.opened]

    def settle_task(self) -> None:
        """Choose the task, and with it the loss where none is given."""
        super().settle_task()
        self.request = replace(self.request, config=self.request.config.for_task(self.task.spec))

    def rehearse(self) -> None:
        """Rehearse without a check that the student has the same classes, which comes later."""
        if comparable(self.teachers[0], self.sample):
            rehearse([self.teachers[0].opened], self.request, task=self.task)
            return
        leave_out(self.teachers[0], self.request.gates, self.request.on_note)
        rehearse([self.opened], self.request, task=self.task)

    def training(self) -> AbstractContextManager[Trainer]:
        """A trainer for the classes that teachers and student have in common."""
        student, request = self.student, self.request
        identity = {
            "command": "distill",
            "source": self.teachers[0].opened.source_sha256,
            "arch": request.arch,
            "student": student.spec,
            "student_source": self.opened.source_sha256,
            "student_arch": student.arch,
            "also": [[each.opened.source_sha256, each.weight] for each in self.teachers[1:]],
            "resize_for_teacher": student.resize_for_teacher,
            "compare_scratch": student.compare_scratch,
            "cache": student.cache is not None,
            "config": request.config.as_dict(),
            "code": request.code,
        }
        self.labels = require_same_names(self.teachers, self.opened)
        return trainer(request, identity, self.sample, self.labels, task=self.task)

    def make(self, trainer: Trainer | None) -> Made:
        """Train the student, and the one without a teacher, or estimate the time of both."""
        assert trainer is not None
        request, program = self.request, self.opened.program
        if program is not None:
            learned = self.labels or names_of_classes(program, trainer.training.train)
            program.labels = program.labels or learned
        context = self._context(trainer)
        original = self.original(context)
        entry, model = self._distilled(context, original)
        scratch = None
        if self.student.compare_scratch:
            alone = self._without_teacher(context, original)
            scratch = alone, scratch_beside(Path(request.output))
        if request.dry_run:
            plan = self._plan(context)
            # Coded, the size depends on weights that there are not yet.
            known = not CODINGS[request.code].wrappers
            plan = replace(plan, predicted_bytes=model.predicted_bytes() if known else None)
            return Made(model, Result("distill", plan=plan, entry=entry))
        return Made(model, Result("distill", entry=entry, notes=distillation_notes(entry)), scratch)

    def _context(self, trainer: Trainer) -> DistillContext:
        request, student = self.request, self.student
        seen = trainer.training.train.input
        members = members_of(self.teachers, seen, resize=student.resize_for_teacher)
        if request.config.terms.compare_outputs:
            require_same_outputs(members, self.opened, seen, self.task.spec)
        hashes = [each.opened.source_sha256 for each in self.teachers]
        known = {name: value for name, value in origin_of(self.opened, request).items() if value}
        known |= self.task.history
        settings = self.context(trainer, METHODS[request.command].stage)
        context = replace(
            DistillContext(**vars(settings)),
            teachers=members,
            on_note=request.on_note,
            origin=known | {"teacher_sha256": hashes},
        )
        if student.cache is None:
            return context
        about = teachers_identity(members, hashes, request.arch)
        cache = CacheRequest(student.cache, about, request.force, request.on_note, request.dry_run)
        return replace(context, cache=cache)

    def _distilled(
        self, context: DistillContext, original: Original
    ) -> tuple[dict[str, Any], CompressedModel]:
        opened, config = self.opened, self.request.config
        if opened.program is not None:
            program = METHODS[self.request.command].apply(opened.program, config, context).program
            return dict(program.history[-1]), CompressedModel.of_program(program, original)
        network = require_network(opened, "the student")
        entry = learn(network, config, context, opened.encodings)
        state = dict(network.state_dict())
        stored = compact_state(state, opened.encodings)
        made = TensorsResult(state, Coverage(()), entry, stored)
        return entry, CompressedModel.of_tensors(opened, made, original)

    def _without_teacher(self, context: DistillContext, original: Original) -> CompressedModel:
        """The same student, trained as long on labels alone, from the same weights."""
        assert self.opened.program is not None
        assert context.training is not None
        student, training = self.opened.program, training_of(self.opened.program, context.training)
        epochs = training.config.epochs + self.request.config.finetune_epochs
        training = replace(training, config=replace(training.config, epochs=epochs))

        def trained() -> Program:
            network = qat.prepare(student)
            require_not_shared(network.encodings)
            masks = Masks.of_state(network.state_dict(), network.encodings)
            outcome = fit(network, training, seed=context.seed, stage=SCRATCH, callbacks=[masks])
            alone = qat.convert(network, student)
            alone.input = alone.input.with_samples_of(training.train.input)
            alone.encodings = compact(alone)
            entry = training_entry(self, training, outcome)
            alone.history = (*student.history, entry)
            return alone.eval()

        return CompressedModel.of_program(Stages(training).once(SCRATCH, trained), original)

    def _plan(self, context: DistillContext) -> Plan:
        """Time estimates, and what the networks cost."""
        training = context.training
        assert training is not None
        learner, sample = require_network(self.opened, "the student"), training.train.input
        networks = [cost_of("teacher", m.name, m.network, m.input) for m in context.teachers]
        networks.append(cost_of("student", self.student.spec, learner, sample))
        kept = None
        if context.cache is not None:
            output = learned_output(learner, sample, task=self.task.spec)
            kept = layout_of(self.request.config, training, output).size
        return Plan(networks, training.estimates or (), cache_bytes=kept)

    def read_back(self, path: Path) -> Opened:
        """One of the outputs, which are students."""
        return ModelFile.of(path).open(self.student.arch, self.sample)

    def compared(self, outputs: list[tuple[Any, Opened]]) -> tuple[Compared, Request]:
        """The teacher, where it can look at the same images, and the students; the last is judged."""
        first = self.teachers[0]
        models = [(first.path, first.opened), *outputs] if comparable(first, self.sample) else outputs
        gates = replace(self.request.gates, judged=len(models) - 1)
        return Compared(models, trained_on=self.request.trained_on), replace(self.request, gates=gates)
