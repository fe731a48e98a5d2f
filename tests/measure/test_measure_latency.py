"""Interleaving, order, statistics, threads; and that the fastest equivalent variant wins."""

import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from modelopt_cli.measure import latency, variants
from modelopt_cli.measure.variants import VARIANTS
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.quantized_linear import DynamicLinear

X = torch.zeros(1, 2)


class Recorder(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.label, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.label)
        assert torch.is_inference_mode_enabled()
        return x


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def play(seed: int) -> list[str]:
    log: list[str] = []
    calls = [(Recorder(name, log), X) for name in "abc"]
    times = latency.time_interleaved(calls, warmup=2, runs=20, seed=seed)
    assert [len(one) for one in times] == [20, 20, 20]
    return log


def test_every_round_calls_every_model_once_in_changing_order() -> None:
    log = play(0)
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 22
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3


def test_order_depends_on_the_seed_alone() -> None:
    assert play(1) == play(1) != play(2)


def test_times_are_milliseconds_of_the_right_model() -> None:
    slow, fast = latency.time_interleaved([(Sleeper(0.01), X), (Sleeper(0.001), X)], warmup=1, runs=5)
    assert min(slow) > 9.5
    assert 0.9 < min(fast) < min(slow) / 2


def test_warmup_is_not_recorded() -> None:
    class FirstIsSlow(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            time.sleep(0.2 if self.calls == 1 else 0)
            return x

    (times,) = latency.time_interleaved([(FirstIsSlow(), X)], warmup=1, runs=3)
    assert max(times) < 150


def test_progress_counts_rounds() -> None:
    seen: list[tuple[int, int | None]] = []
    latency.time_interleaved([], warmup=1, runs=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_median_and_quartiles() -> None:
    times = [5.0, 1.0, 2.0, 100.0, 3.0]
    found = latency.summarise(times, 8, "eager")
    assert (found.median, found.iqr, found.runs) == (statistics.median(times), 3.0, 5)
    assert found.throughput == pytest.approx(8 / 0.003)
    assert latency.summarise([4.0], 1, "eager").iqr == 0.0


def test_threads_are_restored_even_after_a_failure() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail() -> None:
        with latency.threads(before + 1) as count:
            seen.extend((count, torch.get_num_threads()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [before + 1, before + 1]
    assert torch.get_num_threads() == before
    with latency.threads(None) as count:
        assert count == before


def test_images_are_channels_last_and_repeatable() -> None:
    x = latency.sample_input(InputSpec((3, 8, 8)), 4, seed=1)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, latency.sample_input(InputSpec((3, 8, 8)), 4, seed=1))
    assert latency.sample_input(InputSpec((7,)), 2).shape == (2, 7)


def program() -> Program:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    return Program(model, fx.symbolic_trace(model).graph, input_spec=InputSpec((3, 8, 8)))


IMAGES = latency.sample_input(InputSpec((3, 8, 8)), 1)


def use_kernels(monkeypatch: pytest.MonkeyPatch, prepack: Any) -> None:
    monkeypatch.setitem(VARIANTS, "prepacked", replace(VARIANTS["prepacked"], make=prepack))


def test_candidates_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, lambda program: program)
    net = program()
    found = variants.equivalent_variants(net, IMAGES)
    assert [name for _, name in found] == ["eager", "channels-last", "prepacked"]
    assert found[0][0] is net
    assert found[1][0] is not net


def test_prepacked_kernels_are_among_the_candidates() -> None:
    net = program()
    assert [name for _, name in variants.equivalent_variants(net, IMAGES)][-1] == "prepacked"


def test_the_fastest_variant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = program()
    use_kernels(monkeypatch, lambda program: program)
    monkeypatch.setattr(
        variants, "time_interleaved", lambda calls, **_: [[9.0, 5.0], [7.0, 7.0], [4.0, 99.0]]
    )
    assert variants.fastest_variant(net, IMAGES)[1] == "prepacked"


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1, 4, 6, 6)


def broken(*_: object) -> nn.Module:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "prepack", [lambda *_: Wrong(), broken, lambda *_: nn.Identity()], ids=["wrong", "broken", "other-shape"]
)
def test_a_variant_that_fails_or_has_other_outputs_is_no_candidate(
    monkeypatch: pytest.MonkeyPatch, prepack: Any
) -> None:
    net = program()
    use_kernels(monkeypatch, prepack)
    assert [name for _, name in variants.equivalent_variants(net, IMAGES)] == ["eager", "channels-last"]


def test_finding_the_variant_leaves_the_model_alone() -> None:
    net = program()
    strides = [tensor.stride() for tensor in net.state_dict().values()]
    variants.fastest_variant(net, IMAGES)
    assert [tensor.stride() for tensor in net.state_dict().values()] == strides


def test_int8_models_are_timed_as_they_were_loaded() -> None:
    net = nn.Sequential(nn.Flatten(), DynamicLinear(192, 2, False))
    assert variants.fastest_variant(net, IMAGES) == (net, "as loaded")


@pytest.mark.parametrize(("threads", "cores", "said"), [(1, 0.5, 0), (2, 0.5, 1), (2, 1.5, 1), (2, 2.0, 0)])
def test_one_thread_is_never_too_many(threads: int, cores: float, said: int) -> None:
    steady = latency.summarise([1.0, 1.0], 1, "eager")
    notes = latency.noise_notes({"net.pth": steady}, threads, cores)
    assert len(notes) == said
    assert all(note.endswith("give threads=1") for note in notes)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_outputs_of_the_network(name: str) -> None:
    net = program()
    assert VARIANTS[name].applies(net, IMAGES)
    with torch.inference_mode():
        outputs = VARIANTS[name].make(net)(IMAGES)
        assert isinstance(outputs, Tensor)
        torch.testing.assert_close(outputs, net(IMAGES), rtol=1e-4, atol=1e-5)
    assert name in [each for _, each in variants.equivalent_variants(net, IMAGES)]
