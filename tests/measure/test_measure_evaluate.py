"""The whole evaluation: pairing, one pass over the data, what is left out, and what is refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArchitectureError, DataError, InputError, UsageError
from modelopt_cli.measure import (
    EvalOptions,
    EvaluatedModel,
    Evaluation,
    evaluate,
    latency,
    load_time,
    paired_difference,
    paired_speedup,
)
from modelopt_cli.measure.environment import cores, cpu_name
from modelopt_cli.program import InputSpec, Preprocess, Program

QUICK = EvalOptions(runs=3, warmup=1, memory=False, threads=1, data_batch_size=16)
SHAPE = (3, 6, 6)


class Noise:
    """Fifty noise images with random labels; counts how often it is read."""

    name = "noise"
    reads = 0

    def __init__(self, samples: int = 50, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(samples, *SHAPE, generator=generator)
        self.labels = torch.randint(0, 6, (samples,), generator=generator)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        return f"sample {index}"

    def batches(
        self, batch_size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        end = min(limit or len(self), len(self))
        for i in range(0, end, batch_size):
            yield self.images[i : min(i + batch_size, end)], self.labels[i : min(i + batch_size, end)]


def net(seed: int, shape: tuple[int, ...] = SHAPE) -> Program:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))
    model(torch.zeros(1, *shape))
    return Program(model, fx.symbolic_trace(model).graph, input_spec=InputSpec(shape))


def evaluated(seed: int, file_bytes: int = 1000, **changes: Any) -> EvaluatedModel:
    model = net(seed)
    values = {"path": f"net{seed}.pth", "model": model, "program": model, "input": model.input} | changes
    return EvaluatedModel(file_bytes=file_bytes, **{"tensor_bytes": file_bytes, **values})


@pytest.mark.slow
def test_comparison_is_paired_sample_by_sample() -> None:
    first, second, data = evaluated(1), evaluated(2, 250), Noise()
    found = evaluate([first, second], data, QUICK)
    assert data.reads == 1
    correct = []
    for one in (first, second):
        assert one.model is not None
        correct.append((one.model(data.images).argmax(1) == data.labels).numpy())
    (comparison,) = found.comparisons
    assert comparison.model == 1
    assert comparison.difference == paired_difference(*correct)
    assert comparison.ratio == 4.0
    accuracy = found.models[0].accuracy
    assert accuracy is not None
    assert (accuracy.samples, accuracy.top1) == (50, pytest.approx(100 * np.mean(correct[0])))


def test_another_baseline_turns_the_comparison_round() -> None:
    pair = [evaluated(1), evaluated(2, 250)]
    forward = evaluate(pair, Noise(), QUICK).comparisons[0]
    backward = evaluate(pair, Noise(), EvalOptions(baseline=1, runs=0, memory=False)).comparisons[0]
    assert backward.model == 0
    assert backward.ratio == 0.25
    assert forward.difference is not None
    assert backward.difference is not None
    assert backward.difference.drop_pp == -forward.difference.drop_pp


def test_a_model_against_itself_differs_in_nothing() -> None:
    comparison = evaluate([evaluated(1), evaluated(1)], Noise(), QUICK).comparisons[0]
    assert comparison.agreement == comparison.ratio == 1.0
    assert comparison.difference is not None
    assert comparison.difference.drop_pp == 0.0
    assert comparison.difference.low < 0 < comparison.difference.high


def test_without_data_there_is_no_accuracy_but_everything_else() -> None:
    found = evaluate([evaluated(1), evaluated(2)], None, QUICK)
    assert found.models[0].accuracy is None
    assert found.comparisons[0].difference is None
    assert found.comparisons[0].agreement is None
    assert found.comparisons[0].speedup is not None
    assert found.models[0].macs is not None
    assert found.models[0].macs.total == 4 * 16 * 27 + 64 * 6
    latency = found.models[0].latency
    assert latency is not None
    assert latency.variant in ("eager", "channels-last", "prepacked")
    assert latency.runs == 3


def test_nothing_is_timed_where_no_runs_are_asked() -> None:
    found = evaluate([evaluated(1), evaluated(2)], None, EvalOptions(runs=0, memory=False))
    assert found.models[0].latency is None
    assert found.comparisons[0].speedup is None


def test_without_runs_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    found = evaluate([evaluated(1), evaluated(2)], Noise(), EvalOptions(runs=0))
    assert [(model.load_s, model.peak_bytes) for model in found.models] == [(None, None)] * 2
    assert found.notes == ()


def test_the_speedup_is_that_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median ratio is 3, the ratio of the medians 2."""
    times = [[6.0, 8.0, 30.0], [3.0, 2.0, 10.0]]
    monkeypatch.setattr(latency, "time_interleaved", lambda *_, **__: times)
    comparison = evaluate([evaluated(1), evaluated(2)], None, QUICK).comparisons[0]
    assert comparison.speedup == paired_speedup(*times)
    assert comparison.speedup.ratio == 3.0


def test_unsteady_times_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, unsteady = [10.0, 10.0, 11.9, 11.9], [10.0, 10.0, 13.0, 13.0]
    monkeypatch.setattr(latency, "time_interleaved", lambda *_, **__: [steady, unsteady])
    notes = evaluate([evaluated(1), evaluated(2)], None, QUICK).notes
    said = "net2.pth: its times vary, with an interquartile range of 26 % of the median"
    assert [note.partition(";")[0] for note in notes] == [said]


@pytest.mark.parametrize(("here", "said"), [(1.0, True), (1.5, True), (2.0, False), (2.5, False)])
def test_more_threads_than_cores_are_said(monkeypatch: pytest.MonkeyPatch, here: float, said: bool) -> None:
    monkeypatch.setattr(sys.modules["modelopt_cli.measure.side_by_side"], "cores", lambda: here)
    monkeypatch.setattr(latency, "time_interleaved", lambda *_, **__: [[1.0, 1.0]])
    options = EvalOptions(runs=2, memory=False, threads=2)
    notes = evaluate([evaluated(1)], None, options).notes
    assert [note.partition(",")[0] for note in notes] == [
        f"2 threads share {here:g} core{'s' * (here != 1)}"
    ] * said
    assert evaluate([evaluated(1)], Noise(), replace(options, runs=0)).notes == ()


def test_unlabelled_data_still_gives_agreement() -> None:
    found = evaluate([evaluated(1), evaluated(2)], Noise(labelled=False), QUICK)
    assert found.models[0].accuracy is not None
    assert found.models[0].accuracy.top1 is None
    assert found.comparisons[0].difference is None
    assert found.comparisons[0].agreement is not None
    assert "no labels" in found.notes[0]


def test_a_bare_state_dict_is_measured_by_its_size() -> None:
    bare = evaluated(1, model=None, program=None, input=None, state={"w": torch.ones(4)})
    found = evaluate([bare, evaluated(2)], Noise(), QUICK)
    assert found.models[0].size.parameters == 4
    assert found.models[0].accuracy is None
    assert found.models[0].latency is None
    assert found.models[1].accuracy is not None
    assert "so it is not run" in found.notes[0]


def test_a_plain_module_is_measured_like_a_program() -> None:
    plain = evaluated(1, model=nn.Sequential(nn.Flatten(), nn.Linear(108, 6)), program=None)
    found = evaluate([plain, evaluated(2)], Noise(), QUICK)
    assert found.models[0].macs is not None
    assert found.models[0].macs.total == 648
    assert found.models[0].latency is not None


def test_limit_and_progress() -> None:
    seen: list[tuple[str, int, int | None]] = []
    found = evaluate(
        [evaluated(1)],
        Noise(),
        EvalOptions(runs=2, warmup=0, memory=False, limit=20, data_batch_size=8),
        progress=lambda *event: seen.append(event),
    )
    assert found.models[0].accuracy is not None
    assert found.models[0].accuracy.samples == 20
    assert [event for event in seen if event[0] == "accuracy"] == [
        ("accuracy", 8, 20),
        ("accuracy", 16, 20),
        ("accuracy", 20, 20),
    ]
    assert seen[-1] == ("latency", 2, 2)
    assert found.comparisons == ()


def test_dropout_is_off_and_threads_are_restored() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(108, 6)).train()
    before = torch.get_num_threads()
    noisy = evaluated(1, model=model, program=None)
    found = evaluate([noisy, noisy], Noise(), EvalOptions(runs=1, memory=False, threads=before + 1))
    assert found.comparisons[0].agreement == 1.0
    assert found.environment.threads == before + 1
    assert torch.get_num_threads() == before


def test_loading_and_the_reason_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[load_time.Job] = []

    def measured(job: load_time.Job) -> load_time.Loading:
        jobs.append(job)
        return load_time.Loading(0.5, 7) if len(jobs) == 1 else load_time.Loading(None, None, "no such file")

    monkeypatch.setattr(load_time, "measure_loading", measured)
    found = evaluate([evaluated(1, arch="a:b"), evaluated(2)], None, EvalOptions(runs=1, threads=1))
    assert [(model.load_s, model.peak_bytes) for model in found.models] == [(0.5, 7), (None, None)]
    assert jobs[0] == load_time.Job("net1.pth", "a:b", InputSpec(SHAPE), 1, threads=1)
    assert found.notes == ("net2.pth: time to load and peak memory not measured: no such file",)


@pytest.mark.parametrize(("runs", "expected"), [(1, 0.25), (0, None)], ids=["timed", "without-times"])
def test_of_bare_tensors_the_time_to_read_them(
    runs: int, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[load_time.Job] = []
    monkeypatch.setattr(
        load_time, "measure_loading", lambda job: jobs.append(job) or load_time.Loading(0.25, None)
    )
    bare = evaluated(1, model=None, program=None, input=None, state={"w": torch.ones(4)})
    (model,) = evaluate([bare], None, EvalOptions(runs=runs, threads=1)).models
    assert (model.load_s, model.peak_bytes) == (expected, None)
    assert jobs == [load_time.Job("net1.pth", None, None, threads=1)][:runs]


def refused(models: list[EvaluatedModel], data: Any, options: EvalOptions = QUICK) -> Evaluation:
    return evaluate(models, data, options)


def test_models_of_different_input_sizes_are_named() -> None:
    small = net(2, (3, 5, 5))
    other = evaluated(2, model=small, program=small, input=small.input)
    with pytest.raises(DataError, match=r"net1.pth takes samples of \(3, 6, 6\), net2.pth of \(3, 5, 5\)"):
        refused([evaluated(1), other], Noise())
    assert evaluate([evaluated(1), other], None, QUICK).comparisons[0].speedup is not None


def test_another_preprocessing_is_noted() -> None:
    other = evaluated(2, input=InputSpec(SHAPE, Preprocess(mean=(0.5, 0.5, 0.5))))
    assert "another preprocessing" in evaluate([evaluated(1), other], Noise(), QUICK).notes[0]


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :6] / 0 * 0


@pytest.mark.parametrize(
    ("make", "data", "error", "message"),
    [
        pytest.param(lambda: evaluated(1, model=Nan(), program=None), Noise(), InputError, "NaN", id="nan"),
        pytest.param(lambda: evaluated(1), Noise(0), DataError, "not one sample", id="no-samples"),
        pytest.param(
            lambda: evaluated(1, model=nn.Linear(9, 9), program=None),
            None,
            ArchitectureError,
            "net1.pth",
            id="shape",
        ),
        pytest.param(
            lambda: evaluated(1, model=None, input=None),
            Noise(),
            DataError,
            "no model can be run",
            id="bare-with-data",
        ),
    ],
)
def test_refused_in_one_line(make: Any, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        refused([make()], data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("baseline", [-1, 1])
def test_baseline_must_be_among_the_models(baseline: int) -> None:
    with pytest.raises(UsageError, match=r"^baseline: "):
        refused([evaluated(1)], None, EvalOptions(baseline=baseline))


@pytest.mark.parametrize("option", ["batch_size", "warmup", "runs", "threads", "data_batch_size", "limit"])
def test_numbers_that_are_too_small_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=rf"{option}: must be at least"):
        EvalOptions(**{option: -1})


def test_cpu_has_a_name(tmp_path: Any) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\n")
    assert cpu_name(info) == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "none")


QUOTAS = {
    "no group": ({}, "", None),
    "version 2": ({"cpu.max": "150000 100000"}, "0::/", 1.5),
    "version 2, unlimited": ({"cpu.max": "max 100000"}, "0::/", None),
    "version 2, a group above": ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 0.5),
    "version 1": (
        {"cpu/a/cpu.cfs_quota_us": "25000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        "3:cpuset:/a\n4:cpu,cpuacct:/a\n0::/",
        0.25,
    ),
    "version 1, unlimited": (
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        "4:cpu:/",
        None,
    ),
    "more than there are": ({"cpu.max": "100000000 100000"}, "0::/", None),
    "malformed": ({"cpu.max": "x"}, "what:is\n\n:::::", None),
}


@pytest.mark.parametrize(("files", "own", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_cores_are_those_that_the_control_group_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], own: str, expected: float | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    assert cores(tmp_path / "groups", tmp_path / "own") == (4.0 if expected is None else expected)


class Negating(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(108, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x.neg_().flatten(1))
        return result


def test_a_model_that_changes_its_input_spoils_it_for_no_other() -> None:
    torch.manual_seed(0)
    model, data = Negating().eval(), Noise()
    found = evaluate([evaluated(1, model=model, program=None)] * 3, data, QUICK)
    assert [against.agreement for against in found.comparisons] == [1.0, 1.0]
    with torch.no_grad():
        expected = (model(data.images.clone()).argmax(1) == data.labels).double().mean()
    assert [m.accuracy and m.accuracy.top1 for m in found.models] == [
        pytest.approx(100 * float(expected))
    ] * 3
