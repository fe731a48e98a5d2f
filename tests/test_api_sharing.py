"""share from Python, end to end, on a small network and the bundled digits."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelopt_cli
from modelopt_cli import api
from modelopt_cli.artifact import lazy, read_tensors
from modelopt_cli.checkpoint import resolve
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.training import TrainConfig

LENET = "builtin:lenet5?width=0.2"
QUICK = EvalOptions(runs=0, memory=False, threads=1, limit=100)


@pytest.fixture(scope="module")
def lenet5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lenet5") / "net.pth"
    torch.manual_seed(0)
    torch.save(resolve(LENET).build().state_dict(), path)
    return path


def test_a_checkpoint_is_shared_written_and_measured(lenet5: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    outcome = modelopt_cli.share(
        lenet5,
        tmp_path / "out",
        config=ShareConfig(bits=3, weighting="hessian"),
        arch=LENET,
        data="digits",
        options=QUICK,
        progress=lambda stage, done, total: seen.append(stage),
    )
    assert outcome.written is not None
    assert outcome.written.file_bytes == outcome.predicted_bytes == (tmp_path / "out").stat().st_size
    assert {layer.values for layer in outcome.layers} == {8}
    assert outcome.coverage.fraction == 1.0
    assert outcome.target is None
    assert outcome.evaluation is not None
    sizes = [model.size.file_bytes for model in outcome.evaluation.models]
    assert sizes[1] < 0.2 * sizes[0]
    assert "sharing" in seen
    program = modelopt_cli.load(tmp_path / "out")
    assert program.history[-1]["calibration"] == "digits"


@pytest.mark.slow
def test_shards_are_shared_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}.weight": torch.randn(64, 64, generator=generator) for i in range(6)}
    save_file(state, tmp_path / "model.safetensors")
    alive: list[weakref.ref[torch.Tensor]] = []
    most, real = [0], lazy.read_tensor

    def counted(*args: object) -> torch.Tensor:
        most[0] = max(most[0], 1 + sum(ref() is not None for ref in alive))
        tensor = real(*args)  # type: ignore[arg-type]
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(lazy, "read_tensor", counted)
    modelopt_cli.share(
        tmp_path / "model.safetensors", tmp_path / "out", config=ShareConfig(bits=2), evaluate=False
    )
    assert len(alive) >= 6
    assert most[0] == 1
    stored = read_tensors(tmp_path / "out").state
    assert all(len(stored[name].unique()) == 4 for name in state)


def test_what_it_refuses_it_refuses_before_it_reads(lenet5: Path, tmp_path: Path) -> None:
    def share(**options: object) -> object:
        return modelopt_cli.share(lenet5, tmp_path / "out", arch=LENET, **options)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="code: 'zip' is not one of"):
        share(config=ShareConfig(bits=3), code="zip", evaluate=False)
    training = api.TrainingRequest("digits", val="digits", config=TrainConfig(epochs=1))
    with pytest.raises(UsageError, match="is what the result is judged on"):
        share(config=ShareConfig(bits=3), training=training, data="digits")
    assert list(tmp_path.iterdir()) == []
