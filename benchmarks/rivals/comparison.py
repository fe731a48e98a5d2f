"""Figures of quantized networks next to their float one, on samples that nothing was calibrated on."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modelopt_cli
from benchmarks.crops import make_crops
from benchmarks.rivals.networks import CROPS, Case
from benchmarks.rivals.quantizers import BATCH, Given, Quantizer, Run
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.data import Data, open_data
from modelopt_cli.data.targets import Targets
from modelopt_cli.measure.differences import difference
from modelopt_cli.measure.tally import Predictions, Tally, agreement, measured
from modelopt_cli.program.input_batch import Inputs, batch_size, call
from modelopt_cli.tasks import parse_task

CALIBRATION, VALIDATION, TEST = 64, 512, 1000
"""Samples at most: to calibrate on, to try out losses on, and to judge by."""


class Comparison:
    """A float network, its samples, and what it makes of them."""

    def __init__(self, case: Case) -> None:
        _make_missing(case)
        network = case.network
        spec = known_input([ModelFile.of(network.checkpoint)], network.arch, network.data, network.preprocess)
        self.program = modelopt_cli.load(network.checkpoint, arch=network.arch, input_spec=spec).eval()
        self.task = parse_task(case.task)
        judged, held = self._open(case, network.data), self._open(case, network.calib)
        if network.calib == network.data:
            judged, held = judged.split(VALIDATION)
        calibration, _ = _together(held.sample(CALIBRATION))
        validation = _together(held.sample(VALIDATION)) if case.classifies else None
        self._folder = tempfile.TemporaryDirectory()
        self.given = Given(self.program, calibration, validation, Path(self._folder.name))
        self.given.exported  # noqa: B018  is in no quantizer's time
        self.test = list(judged.sample(TEST).batches(BATCH))
        self.outputs, self.predictions = self._judge(lambda inputs: call(self.program, inputs))

    def figures(self, row: Quantizer) -> dict[str, Any]:
        """Signal to noise in dB, seconds of processor time, and what the task's metric loses; or an error."""
        begin = time.process_time()
        try:
            run = row.make(self.given, **row.options)
            seconds = time.process_time() - begin
            outputs, predictions = self._judge(run)
        except Exception as error:  # whatever another library raises is its result
            return {"error": f"{type(error).__name__}: {error}".split("\n")[0][:120]}
        noise = (self.outputs - outputs).square().sum()
        return {
            "db": float(10 * torch.log10(self.outputs.square().sum() / noise)),
            "agreement": agreement(self.predictions, predictions),
            "seconds": seconds,
            **self._loss(predictions),
        }

    def about(self) -> dict[str, Any]:
        """The number of samples, and the float network's own metric as text."""
        name, metric = next(iter(self.predictions.rows.items()))
        value = metric.text(measured(metric, self.predictions.scores[name]) or 0)
        samples = {"calibration": batch_size(self.given.inputs), "test": self.predictions.samples}
        return {**samples, "metric": metric.title, "float": value}

    def _loss(self, predictions: Predictions) -> dict[str, str]:
        """The task's main metric, its loss and the 95 % interval of that, as text with units."""
        name, metric = next(iter(predictions.rows.items()))
        after = predictions.scores[name]
        loss = difference(metric, self.predictions.scores[name], after)
        return {
            "value": metric.text(measured(metric, after) or 0),
            "loss": metric.drop_text(loss.drop),
            "interval": metric.interval_text(loss.low, loss.high),
        }

    def _open(self, case: Case, spec: str) -> Data:
        how = {"input_spec": self.program.input, "overrides": case.network.preprocess, "labels": False}
        return self.task.read_targets(open_data(spec, **how))

    @torch.no_grad()
    def _judge(self, run: Run) -> tuple[Tensor, Predictions]:
        tally, outputs = Tally("the network", self.task), []
        for inputs, targets in self.test:
            outputs.append(run(inputs))
            tally.add(outputs[-1], targets, inputs)
        return torch.cat(outputs).double(), tally.result()


def _together(data: Data) -> tuple[Inputs, Targets]:
    return next(data.batches(len(data)))


def _make_missing(case: Case) -> None:
    """Train the network and cut the crops where they are not there."""
    if case.training and not Path(case.network.checkpoint).exists():
        command = [sys.executable, "-m", "modelopt_cli", "train", *case.training, "-o"]
        subprocess.run([*command, case.network.checkpoint], check=True)
    if not (CROPS / "test.npz").exists():
        make_crops(CROPS, calibration=4, test=10)
