"""Schedules: formulas, masks through training, resumed runs to the same bytes, the teacher."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prune_cases import captured
from torch import Tensor, nn

from modelopt_cli.artifact import write_program
from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune import rounds as rounds_module
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.prune.rounds import GROWN_AT, Growing, require_zeros
from modelopt_cli.methods.prune.schedules import cubic, epochs_of_round
from modelopt_cli.methods.prune.target_figures import TargetNotReached
from modelopt_cli.program import Program
from modelopt_cli.tasks import TaskSpec
from modelopt_cli.training import TrainConfig, Training
from modelopt_cli.training.run_folder import Run

CONFIG = TrainConfig(epochs=3, batch_size=64, lr=0.05)
ZEROS = PruneConfig(structure="unstructured", sparsity=0.8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.mid, self.fc = nn.Conv2d(16, 16, 3, stride=2), nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(torch.relu(self.bn(self.conv(x)))))
        result: Tensor = self.fc(x.flatten(1))
        return result


def small() -> Program:
    torch.manual_seed(0)
    return captured(Small(), 1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits?split=train").sample(320)


def within(digits: Data, config: TrainConfig = CONFIG, **more: object) -> Context:
    return Context(data=digits, training=Training(digits, config=config, **more))  # type: ignore[arg-type]


def sparsity(program: Program) -> float:
    weights = [tensor for tensor in program.parameters() if tensor.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.99, 1.0, 1.5])
def test_schedule_cubic_is_the_published_formula(progress: float) -> None:
    final, start, t = 0.9, 0.2, min(progress, 1.0)
    published = (
        final + (start - final) * (1 - t) ** 3
    )  # Zhu and Gupta 2018, eq. 1, with t = (step - t0) / n dt
    assert cubic(final, progress, start) == pytest.approx(published)


@pytest.mark.parametrize(("epochs", "rounds"), [(3, 3), (10, 3), (7, 5), (1, 1)])
def test_schedule_shares_the_epochs_among_the_rounds(epochs: int, rounds: int) -> None:
    shares = [epochs_of_round(epochs, rounds, number) for number in range(rounds)]
    assert sum(shares) == epochs
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 333, 5000])
def test_schedule_growing_masks_follow_the_formula_and_end_before_the_best_are_chosen(steps: int) -> None:
    asked: list[float] = []

    def choose(network: nn.Module, ratio: float) -> dict[str, Tensor]:
        asked.append(ratio)
        return {"weight": torch.arange(100).view(10, 10) >= 100 * ratio}

    layer, masks, changed = nn.Linear(10, 10), Growing(choose, 0.1, 0.8), []
    for step in range(steps):
        before = len(asked)
        masks.before_step(layer, step, steps)
        with torch.no_grad():
            layer.weight += 1
        masks.after_step(layer, step, steps)
        changed += [step] * (len(asked) - before)
        assert int((layer.weight == 0).sum()) == round(100 * asked[-1] + 1e-9) or asked[-1] * 100 % 1
    last = changed[-1]
    assert asked[-1] == 0.8
    assert last + 1 <= max(1, GROWN_AT * steps)
    assert asked == sorted(asked)
    assert len(asked) <= 202
    expected = [0.8 - 0.7 * (1 - (step / last if last else 1.0)) ** 3 for step in changed]
    np.testing.assert_allclose(asked, expected)


def test_schedule_growing_masks_survive_an_interruption() -> None:
    masks = Growing(lambda network, ratio: {"weight": torch.rand(3, 3) > ratio}, 0.0, 0.5)
    masks.before_step(nn.Linear(3, 3), 0, 10)
    again = Growing(lambda network, ratio: {}, 0.0, 0.5)
    again.restore(masks.state())
    assert torch.equal(again.masks["weight"], masks.masks["weight"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": "gradual"}, {"schedule": "iterative"}, {"schedule": "gradual", "allocation": "lamp"}],
    ids=str,
)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_schedule_trains_and_the_zeros_hold(settings: dict[str, str], ema: float, digits: Data) -> None:
    program = small()
    before = copy.deepcopy(program.state_dict())
    result = apply(program, replace(ZEROS, **settings), within(digits, replace(CONFIG, ema=ema)))  # type: ignore[arg-type]
    assert sparsity(result.program) == pytest.approx(0.8, abs=1e-3)
    kept = result.program.get_parameter("fc.weight")
    moved = kept[kept != 0] != program.get_parameter("fc.weight")[kept != 0]
    assert float(moved.double().mean()) > 0.99
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())
    entry = result.program.history[-1]
    assert entry["training"]["epochs"] == 3
    assert entry["training"]["data"] == digits.name
    assert result.program.encodings["fc.weight"].codec == "sparse"


def test_schedule_gradual_keeps_the_best_epoch_only_of_those_with_the_final_zeros(digits: Data) -> None:
    config = replace(CONFIG, epochs=4, lr=0.5, patience=1, val_fraction=0.2)
    result = apply(small(), replace(ZEROS, sparsity=0.97, schedule="gradual"), within(digits, config))
    assert sparsity(result.program) == pytest.approx(0.97, abs=1e-3)


def test_schedule_gradual_reaches_a_number_of_parameters(digits: Data) -> None:
    config = PruneConfig(structure="block", params=0.25, schedule="gradual")
    result = apply(small(), config, within(digits))
    nonzero = sum(int(torch.count_nonzero(p)) for p in result.program.parameters())
    assert nonzero / sum(p.numel() for p in small().parameters()) == pytest.approx(0.25, abs=0.01)


def test_schedule_iterative_goes_in_equal_parts_of_the_original(digits: Data, tmp_path: Path) -> None:
    with Run(tmp_path / "run", identity={}, resume=False) as run:
        apply(small(), replace(ZEROS, schedule="iterative"), within(digits, run=run))
        stages = [run.finished(f"prune-{i}") for i in (1, 2, 3)]
        tuned = [run.finished(f"tune-{i}") for i in (1, 2, 3)]
    for i, (pruned, trained) in enumerate(zip(stages, tuned, strict=True), 1):
        assert pruned is not None
        assert trained is not None
        assert sparsity(pruned) == sparsity(trained) == pytest.approx(0.8 * i / 3, abs=1e-3)


def test_schedule_iterative_patterns_lose_one_of_m_after_the_other(digits: Data, tmp_path: Path) -> None:
    with Run(tmp_path / "run", identity={}, resume=False) as run:
        config = PruneConfig(structure="1:4", schedule="iterative", exclude=("conv",))
        apply(small(), config, within(digits, run=run))
        found = [run.finished(f"prune-{i}") for i in (1, 2, 3)]
    for program, kept in zip(found, (3, 2, 1), strict=True):
        assert program is not None
        groups = program.get_parameter("mid.weight").movedim(1, -1).reshape(-1, 4)
        assert set((groups != 0).sum(1).tolist()) == {kept}


def test_schedule_iterative_channels_are_measured_against_the_original(digits: Data) -> None:
    config = PruneConfig(params=0.5, schedule="iterative", round_to=1)
    result = apply(small(), config, within(digits))
    left = sum(p.numel() for p in result.program.parameters()) / sum(p.numel() for p in small().parameters())
    assert result.target is not None
    assert result.target.reached == pytest.approx(left)
    assert left == pytest.approx(0.5, abs=0.01)


class Stop(Exception):
    """An interruption."""


def interrupting(at: int) -> object:
    def progress(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("tune") and done >= at:
            raise Stop

    return progress


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "at"),
    [
        pytest.param(ZEROS, 7, id="one-shot"),
        pytest.param(replace(ZEROS, schedule="gradual"), 4, id="gradual-growing"),
        pytest.param(replace(ZEROS, schedule="gradual"), 13, id="gradual-grown"),
        pytest.param(PruneConfig(params=0.5, schedule="iterative", rounds=2, round_to=1), 6, id="channels"),
    ],
)
def test_schedule_resumed_gives_the_bytes_of_an_uninterrupted_run(
    config: PruneConfig, at: int, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_cli.training.loop._REPORT_EVERY", 0.0)
    training = replace(CONFIG, save_every=3)

    def once(name: str, resume: bool, progress: object = None) -> str:
        with Run(tmp_path / name, identity={}, resume=resume) as run:
            result = apply(small(), config, within(digits, training, run=run, progress=progress))
        return write_program(result.program, tmp_path / f"{name}.safetensors").sha256

    with pytest.raises(Stop):
        once("broken", False, interrupting(at))
    assert once("broken", True) == once("whole", False)


def test_schedule_training_that_undoes_pruning_is_a_bug_of_ours(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masks, "after_step", lambda *args: None)
    with pytest.raises(ModeloptError, match="brought pruned weights back") as caught:
        apply(small(), ZEROS, within(digits))
    assert caught.value.exit_code == 4


def test_schedule_check_looks_at_every_mask() -> None:
    network = small()
    with torch.no_grad():
        network.get_parameter("mid.weight")[0, 0] = 0
    masks = {"mid.weight": network.get_parameter("mid.weight") != 0}
    require_zeros(network, masks)
    masks["conv.weight"] = torch.zeros(16, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ModeloptError, match=r"conv\.weight"):
        require_zeros(network, masks)


@pytest.mark.slow
def test_schedule_teacher_is_the_network_before_pruning(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, seen = small(), []
    with torch.no_grad():
        program.get_parameter("fc.weight").mul_(10)  # answers of its own, that no label asks for
    real = rounds_module.objective

    def spy(config: TrainConfig, teacher: nn.Module | None = None, *task: TaskSpec) -> object:
        seen.append(None if teacher is None else copy.deepcopy(teacher.state_dict()))
        return real(config, teacher, *task)

    monkeypatch.setattr(rounds_module, "objective", spy)
    longer = replace(CONFIG, epochs=10)
    taught = apply(program, ZEROS, within(digits, replace(longer, teacher="self", distill_weight=1.0)))
    plain = apply(program, ZEROS, within(digits, longer))
    for name, tensor in program.state_dict().items():
        assert torch.equal(seen[0][name], tensor)
    images = torch.cat([images for images, _ in digits.batches(64)])
    with torch.no_grad():
        answers = program(images)
        far = {
            name: float((result.program(images) - answers).square().mean())
            for name, result in (("taught", taught), ("plain", plain))
        }
    assert far["taught"] < 0.5 * far["plain"]


def test_schedule_a_target_that_is_missed_is_said_before_any_training(digits: Data) -> None:
    def progress(stage: str, done: int, total: int | None) -> None:
        raise AssertionError("trains")

    config = PruneConfig(structure="layers", flops=0.5)
    with pytest.raises((TargetNotReached, ModeloptError)):
        apply(small(), config, within(digits, progress=progress))


@pytest.mark.parametrize(
    ("config", "training", "words"),
    [
        (replace(ZEROS, schedule="iterative", rounds=4), CONFIG, "4 rounds need at least as many epochs"),
        (replace(ZEROS, schedule="iterative"), None, "give train"),
        (replace(ZEROS, schedule="gradual"), None, "give train"),
    ],
)
def test_schedule_that_cannot_be_followed_is_refused(
    config: PruneConfig, training: TrainConfig | None, words: str, digits: Data
) -> None:
    context = within(digits, training) if training is not None else Context(data=digits)
    with pytest.raises(UsageError, match=words):
        apply(small(), config, context)


def test_schedule_gradual_keeps_the_zeros_of_an_earlier_pruning(digits: Data) -> None:
    first = apply(small(), replace(ZEROS, sparsity=0.3, criterion="random"), Context()).program
    config = PruneConfig(structure="block", sparsity=0.5, schedule="gradual")
    second = apply(first, config, within(digits)).program
    for name in first.encodings:
        assert not bool(second.get_parameter(name)[first.get_parameter(name) == 0].any())
