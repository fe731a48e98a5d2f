"""Measure several models side by side, on the same samples and in the same rounds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from modelopt_cli.errors import ArchitectureError, DataError
from modelopt_cli.measure import accuracy, latency, load_time
from modelopt_cli.measure.comparing import compare_all, summarise, undefined_notes
from modelopt_cli.measure.config import EvalOptions
from modelopt_cli.measure.device import to_device
from modelopt_cli.measure.environment import cores, environment
from modelopt_cli.measure.evaluated_model import EvaluatedModel, LabelledBatches, StageProgress
from modelopt_cli.measure.evaluation import Evaluation, ModelReport
from modelopt_cli.measure.flops import Macs, count_macs
from modelopt_cli.measure.half_note import half_note
from modelopt_cli.measure.metrics import metrics_of
from modelopt_cli.measure.on_data import OnData, Scores
from modelopt_cli.measure.size import measure_size
from modelopt_cli.measure.sparsity import sparsity_note
from modelopt_cli.measure.variants import fastest_variant
from modelopt_cli.program.samples import tokens_of
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec


def evaluate(
    models: Sequence[EvaluatedModel],
    data: LabelledBatches | None = None,
    options: EvalOptions | None = None,
    progress: StageProgress | None = None,
    task: TaskSpec = CLASSIFY,
) -> Evaluation:
    """Measure every model and compare it with the baseline.

    The data is read once, each batch going through all the models, so all of them see the same
    samples. Models are put into evaluation mode and moved to ``options.device``; a model that
    cannot be run is measured by its size alone, and a note says so. Without data the outputs are compared on
    noise.

    Raises:
        UsageError: no model, or a baseline that is not among them.
        DataError: the models take different inputs, or the data does not suit them.
        InputError: a model is not one for the task, or gives NaN.
        EnvironmentFailure: the memory or the device does not suffice.
    """
    options = options or EvalOptions()
    options.require_baseline(len(models))
    return _Run(models, data, options, progress, task).evaluation()


class _Run:
    """One evaluation: the stages share the models, the options, and the notes they leave."""

    def __init__(
        self,
        models: Sequence[EvaluatedModel],
        data: LabelledBatches | None,
        options: EvalOptions,
        progress: StageProgress | None,
        task: TaskSpec,
    ) -> None:
        self.models, self.data, self.options = models, data, options
        self.progress, self.task = progress, task
        self.notes: list[str] = []
        self.incomparable: dict[int, str] = {}
        self.runnable = [i for i, evaluated in enumerate(models) if evaluated.runs]

    def evaluation(self) -> Evaluation:
        for evaluated in self.models:
            to_device(evaluated, self.options.device)
            if (obstacle := evaluated.obstacle) is not None:
                self.notes.append(f"{evaluated.path}: {obstacle.reason} ({obstacle.hint}), so it is not run")
            elif evaluated.program:
                about = (f(evaluated.program, self.options.device) for f in (sparsity_note, half_note))
                self.notes += [f"{evaluated.path}: {note}" for note in about if note]
        if self.data is not None:
            self._check_inputs(self.data)
        with latency.threads(self.options.threads) as threads:
            macs = {i: self._macs(self.models[i]) for i in self.runnable}
            predictions, fidelities = self._scores()
            latencies = self._latencies()
        timed = {self.models[i].path: each for i, each in latencies.items()}
        available = cores() if self.options.device == "cpu" else math.inf
        self.notes += latency.noise_notes(timed, threads, available)
        loadings = self._loadings(threads)
        models = tuple(
            ModelReport(
                path=evaluated.path,
                size=measure_size(evaluated),
                macs=macs.get(i),
                accuracy=summarise(predictions.get(i)),
                latency=latencies.get(i),
                peak_bytes=loadings[i].peak_bytes,
                coverage=evaluated.coverage.fraction if evaluated.coverage else None,
                load_s=loadings[i].seconds,
                weight_coverage=evaluated.coverage.byte_fraction if evaluated.coverage else None,
            )
            for i, evaluated in enumerate(self.models)
        )
        self.notes += undefined_notes(models, predictions)
        return Evaluation(
            models=models,
            baseline=self.options.baseline,
            comparisons=compare_all(
                models, predictions, fidelities, self.options.baseline, self.incomparable
            ),
            environment=environment(threads, self.options.device),
            data=None if self.data is None else self.data.name,
            notes=tuple(self.notes),
            rows=metrics_of(self.task),
        )

    def _macs(self, evaluated: EvaluatedModel) -> Macs:
        assert evaluated.model is not None
        assert evaluated.input is not None
        try:
            baseline = self.models[self.options.baseline].model
            return count_macs(evaluated.model, evaluated.input, calls_of=baseline)
        except ArchitectureError as error:
            raise ArchitectureError(error.message, where=evaluated.path, hint=error.hint) from error

    def _check_inputs(self, data: LabelledBatches) -> None:
        """Refuse models that take different shapes: all see the same tensors."""
        if not self.runnable:
            whys = [model.unknown for model in self.models if model.unknown]
            hint = "; ".join([*whys, f"give {option('arch')}"])
            raise DataError("no model can be run on it", where=data.name, hint=hint)
        first = self.models[self.runnable[0]]
        assert first.input is not None
        for i in self.runnable[1:]:
            other = self.models[i]
            assert other.input is not None
            sizes = [[each.shape for each in model.input.tensors] for model in (first, other) if model.input]
            if sizes[0] != sizes[1]:
                ours, theirs = (" and ".join(map(str, each)) for each in sizes)
                raise DataError(
                    f"{first.path} takes samples of {ours}, {other.path} of {theirs}",
                    where=data.name,
                    hint="evaluate them in two commands",
                )
            if other.input.preprocess not in (None, first.input.preprocess):
                self.notes.append(
                    f"{other.path} records another preprocessing than {first.path}; both saw the same samples"
                )

    def _scores(self) -> Scores:
        """Scores of each runnable model's outputs, and their nearness to the baseline's."""
        data, on_data = self.data, OnData(self.models, self.runnable, self.options, self.task)
        if data is None:
            scores: Scores = {}, on_data.on_noise()
            self.notes += on_data.notes()
            self.incomparable = on_data.incomparable
            return scores
        total = self._samples(data)
        scores = on_data.scores(data, lambda done: self._report("accuracy", done, total))
        self.notes += on_data.notes()
        self.incomparable = on_data.incomparable
        if not data.labelled:
            self.notes.append(f"{data.name} has no labels, so there is no accuracy; outputs are compared")
        return scores

    def _samples(self, data: LabelledBatches) -> int | None:
        """Number of samples to come, where the data can tell."""
        try:
            length = len(data)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return self.options.limit
        return min(length, self.options.limit or length)

    def _latencies(self) -> dict[int, latency.Latency]:
        options = self.options
        if not options.runs or not self.runnable:
            return {}
        calls, variants = [], []
        for done, i in enumerate(self.runnable):
            evaluated = self.models[i]
            assert evaluated.model is not None
            assert evaluated.input is not None
            x = latency.sample_input(
                evaluated.input,
                options.batch_size,
                seed=options.seed,
                device=options.device,
                below=tokens_of(evaluated.model.modules()),
            )
            accuracy.run(evaluated.model, x, evaluated.path)  # fails here, in one line, or not at all
            variant, name = fastest_variant(evaluated.model, x, seed=options.seed)
            calls.append((variant, x))
            variants.append(name)
            self._report("fastest variant", done + 1, len(self.runnable))
        times = latency.time_interleaved(
            calls,
            warmup=options.warmup,
            runs=options.runs,
            seed=options.seed,
            progress=lambda done, total: self._report("latency", done, total),
        )
        return {
            i: latency.summarise(spent, options.batch_size, name)
            for i, spent, name in zip(self.runnable, times, variants, strict=True)
        }

    def _loadings(self, threads: int) -> list[load_time.Loading]:
        """Time and memory to open each file; empty values where no times are wanted."""
        if not (self.options.memory and self.options.runs):
            return [load_time.Loading(None, None)] * len(self.models)
        loadings = []
        for i, evaluated in enumerate(self.models):
            loadings.append(self._loading(evaluated, threads))
            if loadings[i].reason:
                reason = loadings[i].reason.removeprefix(f"{evaluated.path}: ")
                self.notes.append(f"{evaluated.path}: time to load and peak memory not measured: {reason}")
            self._report("loading", i + 1, len(self.models))
        return loadings

    def _loading(self, evaluated: EvaluatedModel, threads: int) -> load_time.Loading:
        options = self.options
        if not evaluated.runs:
            return load_time.measure_loading(load_time.Job(evaluated.path, None, None, threads=threads))
        assert evaluated.model is not None
        assert evaluated.input is not None
        model, input_spec = evaluated.model, evaluated.input
        job = load_time.Job(
            evaluated.path,
            evaluated.arch,
            input_spec,
            options.batch_size,
            threads,
            options.device,
        )
        measured = load_time.measure_loading(job)
        if options.device == "cpu":
            return measured
        x = latency.sample_input(input_spec, options.batch_size, device=options.device)
        run = partial(accuracy.run, model, x, evaluated.path)
        return replace(measured, peak_bytes=load_time.peak_memory_cuda(run, options.device))

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self.progress:
            self.progress(stage, done, total)
