"""One pass over the data, each batch through every model: what metrics keep, and how alike outputs are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.data.targets import target_count
from modelopt_cli.errors import DataError
from modelopt_cli.measure import accuracy, latency
from modelopt_cli.measure.config import EvalOptions
from modelopt_cli.measure.evaluated_model import EvaluatedModel, LabelledBatches
from modelopt_cli.measure.fidelity import Fidelity, FidelityTally
from modelopt_cli.measure.tally import Predictions, Tally
from modelopt_cli.program.input_batch import Inputs, clone, to
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.output_structure import are_detections
from modelopt_cli.program.parted import PartCall, has_same_parts, recorded_calls
from modelopt_cli.program.samples import tokens_of
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.text import listing

NOISE_SAMPLES = 8
"""Samples of noise that outputs are compared on where there is no data."""

_BOXES = "boxes of two networks do not belong together one by one"
_NO_RECORD: AbstractContextManager[Sequence[PartCall]] = nullcontext(())
Scores = tuple[dict[int, Predictions], dict[int, Fidelity]]


class OnData:
    """Runs models next to one another.

    Args:
        models: all of them.
        runnable: indices of those that can be called.
        options: baseline, device, batch size, seed.
        task: what they are for.

    Attributes:
        incomparable: of each model whose outputs are not compared with the baseline's, the reason.
    """

    def __init__(
        self, models: Sequence[EvaluatedModel], runnable: Sequence[int], options: EvalOptions, task: TaskSpec
    ) -> None:
        self._models, self._options, self._task = models, options, task
        self._apart: dict[str, str] = {}
        self.incomparable: dict[int, str] = {}
        self._notes: list[str] = []
        # The baseline first: the others are compared with it.
        self._order = sorted(runnable, key=lambda i: i != options.baseline)

    def scores(self, data: LabelledBatches, report: Callable[[int], None]) -> Scores:
        """Score each model's outputs on all samples, and compare them with the baseline's.

        Args:
            data: samples that all models take.
            report: called with the number of samples done.

        Raises:
            DataError: there is not one sample, or the models do not take them.
            InputError: a model is not one for the task, or gives NaN.
        """
        options, likenesses = self._options, self._likenesses(self._order)
        tallies = {
            i: Tally(self._models[i].path, self._task, labelled=data.labelled, name=data.where)
            for i in self._order
        }
        done = 0
        batches = data.batches(options.data_batch_size, limit=options.limit, workers=options.workers)
        for inputs, targets in batches:
            samples = target_count(targets)
            counted = self._task.counted(targets if data.labelled else None, inputs)
            moved = to(inputs, options.device)
            for i, outputs in self._outputs(self._order, moved, samples, likenesses, counted):
                tallies[i].add(outputs, targets, inputs)
            done += samples
            report(done)
        if not done:
            raise DataError("holds not one sample", where=data.name)
        predictions = {i: tally.result() for i, tally in tallies.items()}
        for each in list(predictions.values())[:1]:  # the targets are the same for all
            self._tell_alone(each.alone, done, data)
        return predictions, self._fidelities(likenesses)

    def _tell_alone(self, places: Sequence[int], done: int, data: LabelledBatches) -> None:
        """Refuse samples without the others that belong to them; a note where the data were cut short."""
        if not places:
            return
        first = data.where(places[0])
        if done != self._options.limit:
            hint = "a pair is two samples of one number"
            raise DataError("no other sample belongs to the same pair", where=first, hint=hint)
        left = "is left out" if len(places) == 1 else "are left out"
        self._notes.append(
            f"{len(places):,} of {done:,} samples {left}, since the other of the pair comes later: {first}"
        )

    def on_noise(self) -> dict[int, Fidelity]:
        """Compare outputs on noise with the baseline's, of models that take samples as it does."""
        options = self._options
        if not self._order or self._order[0] != options.baseline:
            return {}
        first = self._models[options.baseline]
        assert first.input is not None
        assert first.model is not None
        alike = [i for i in self._order if _takes(self._models[i], first.input)]
        likenesses = self._likenesses(alike)
        if not likenesses:
            return {}
        below = tokens_of(first.model.modules())
        inputs = latency.sample_input(
            first.input, NOISE_SAMPLES, seed=options.seed, device=options.device, below=below
        )
        for _ in self._outputs(alike, inputs, NOISE_SAMPLES, likenesses):
            pass
        return self._fidelities(likenesses)

    def _fidelities(self, likenesses: Mapping[int, FidelityTally]) -> dict[int, Fidelity]:
        """The likeness of each model that has one; a note says what of it cannot be measured, and why."""
        for i, tally in likenesses.items():
            if (reason := tally.unlike) is not None:
                self.incomparable[i] = reason
            told = reason and f"signal to noise and cosine not measured: {reason}"
            for note in (told, tally.left_out, tally.not_numbers()):
                if note is not None:
                    self._notes.append(f"{self._models[i].path}: {note}")
        found = {i: result for i, tally in likenesses.items() if (result := tally.result()) is not None}
        alone = "the one number of a single sample has no more than a sign"
        for i in (i for i, result in found.items() if not result.cosine):
            self._notes.append(f"{self._models[i].path}: cosine not measured: {alone}")
        return found

    def _likenesses(self, order: Sequence[int]) -> dict[int, FidelityTally]:
        """A tally for each model but the baseline; none where that is not among them."""
        baseline = self._options.baseline
        if baseline not in order:
            return {}
        return {i: FidelityTally(self._task) for i in order if i != baseline}

    def _outputs(
        self,
        order: Sequence[int],
        inputs: Inputs,
        samples: int,
        likenesses: Mapping[int, FidelityTally],
        counted: Tensor | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """The outputs of each model, all compared with those of the baseline, which comes first."""
        expected: Any = None
        calls: Sequence[PartCall] = ()
        for i in order:
            evaluated = self._models[i]
            assert evaluated.model is not None
            # Each has its own: a network may change what it is given.
            record = recorded_calls(evaluated.model) if likenesses and i not in likenesses else _NO_RECORD
            with record as seen:
                outputs = accuracy.run(evaluated.model, clone(inputs), evaluated.path)
            if evaluated.columns is not None and isinstance(outputs, Tensor) and outputs.dim() == 2:
                outputs = outputs[:, list(evaluated.columns)]
            if i in likenesses:
                if are_detections(expected):
                    self._add_calls(likenesses[i], i, calls, samples)
                else:
                    likenesses[i].add(expected, outputs, samples, counted)
            elif likenesses:
                expected, calls = outputs, seen
            yield i, outputs

    def _add_calls(
        self, likeness: FidelityTally, place: int, calls: Sequence[PartCall], samples: int
    ) -> None:
        """Compare what the parts of a detector compute of the same inputs, where it has the same parts."""
        made, baseline = self._models[place], self._models[self._options.baseline]
        assert made.model is not None
        assert baseline.model is not None
        if not has_same_parts(made.model, baseline.model):
            self._apart[made.path] = "they are not compared"
            self.incomparable[place] = _BOXES
            return
        parts = listing(list(dict.fromkeys(call.path for call in calls)))
        self._apart[made.path] = (
            f"signal to noise and cosine are of what its parts ({parts}) return for what reaches them "
            f"in {baseline.path}"
        )
        for call in calls:
            with torch.inference_mode(), accuracy.failing_in_one_line(call.inputs[0], made.path):
                again = call.repeated(made.model)
            likeness.add_parts({call.path: call.outputs}, {call.path: again}, samples)

    def notes(self) -> list[str]:
        """Lines on outputs that are NaN, and on detectors: boxes are not compared one by one."""
        return self._notes + [f"{path}: {_BOXES}; {compared}" for path, compared in self._apart.items()]


def _takes(evaluated: EvaluatedModel, sample: InputSpec) -> bool:
    """True if a model takes the samples that another one takes."""
    own = evaluated.input
    return own is not None and _forms(own) == _forms(sample)


def _forms(sample: InputSpec) -> list[tuple[Any, ...]]:
    return [(each.shape, each.dtype) for each in sample.tensors]
