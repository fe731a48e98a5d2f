import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelopt_cli.errors import EnvironmentFailure, ModeloptError, OutputError, UsageError
from modelopt_cli.program import Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.training.distributed import World
from modelopt_cli.training.run_folder import Run
from modelopt_cli.training.state import State

IDENTITY = {"source": "ab" * 32, "seed": 0, "config": {"epochs": 10, "lr": 0.1}}


def start(folder: Path, *, resume: bool = False, **changes: Any) -> Run:
    return Run(folder / "net.run", identity={**IDENTITY, **changes}, resume=resume)


def small(seed: int) -> Program:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return capture(network.eval(), InputSpec((1, 4, 4)))


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "net.run"))


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert run.finished("round-1") is None
        run.finish("round-1", small(1))
        run.save("round-2", State({"w": torch.ones(2)}, {"epoch": 3}))
    with start(tmp_path, resume=True) as run:
        program = run.finished("round-1")
        assert program is not None
        images = torch.randn(2, 1, 4, 4)
        assert torch.equal(program(images), small(1)(images))
        assert run.finished("round-2") is None
        assert run.load("round-3") is None
        state = run.load("round-2")
        assert state is not None
        assert state.about == {"epoch": 3}
        assert torch.equal(state.tensors["w"], torch.ones(2))


def test_a_finished_stage_has_no_state(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save("a", State())
        run.finish("a", small(1))
        assert run.load("a") is None
        assert run.finished("a") is not None


def test_with_nothing_to_resume_it_just_starts(tmp_path: Path) -> None:
    with start(tmp_path, resume=True) as run:
        assert run.load("a") is None
        run.save("a", State())
    with start(tmp_path, resume=True) as run:
        assert run.load("a") is not None


def test_looking_whether_a_run_could_be_refuses_the_same_and_leaves_everything(tmp_path: Path) -> None:
    def look(**how: Any) -> None:
        with Run(tmp_path / "net.run", **{"identity": IDENTITY, "resume": False, "dry": True, **how}) as run:
            run.log.add("a", 1, 1, loss=0.0)

    look()
    assert os.listdir(tmp_path) == []
    with start(tmp_path) as run:
        run.save("a", State(about={"epoch": 3}))
    before = {path: path.read_bytes() for path in (tmp_path / "net.run").iterdir()}
    with pytest.raises(UsageError, match="holds an interrupted run"):
        look()
    with pytest.raises(UsageError, match="was begun otherwise"):
        look(resume=True, identity=IDENTITY | {"seed": 1})
    for allowed in ({"resume": True}, {"force": True}):
        look(**allowed)
    assert {path: path.read_bytes() for path in (tmp_path / "net.run").iterdir()} == before


def test_an_interrupted_run_is_not_overwritten(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save("a", State(about={"epoch": 3}))
    with pytest.raises(UsageError, match=r"holds an interrupted run.*resume=True.*force=True"):
        start(tmp_path)
    with start(tmp_path, resume=True) as run:
        assert run.load("a") is not None
    with Run(tmp_path / "net.run", identity=IDENTITY, resume=False, force=True) as run:
        assert run.load("a") is None
    with start(tmp_path):
        pass


def test_resuming_something_else_is_refused_and_named(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save("a", State())
    for changes, words in (
        ({"seed": 1}, r"seed \(0, now 1\);"),
        ({"config": {"epochs": 20, "lr": 0.1}}, r"config.epochs \(10, now 20\);"),
        ({"teacher": "self"}, r'teacher \(nothing, now "self"\);'),
        ({"source": "cd" * 32, "seed": 2}, r"seed \(0, now 2\), source \(\"abab"),
    ):
        with pytest.raises(UsageError, match=f"begun otherwise: .*{words}.*force=True"):
            start(tmp_path, resume=True, **changes)
    (tmp_path / "net.run" / "identity.json").write_bytes(b'{"seed": 0')
    with pytest.raises(UsageError, match="is damaged"):
        start(tmp_path, resume=True)
    (tmp_path / "net.run" / "identity.json").unlink()
    with pytest.raises(UsageError, match=r"not those of a run; .* run_dir"):
        start(tmp_path, resume=True)


def test_what_no_run_has_written_is_not_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "net.run"
    folder.mkdir()
    for name in ("state.safetensors", "stage-best.safetensors"):
        (folder / name).write_bytes(b"mine")
        with pytest.raises(UsageError, match=r"not those of a run; .* run_dir"):
            Run(folder, identity=IDENTITY, resume=False, force=True)
        assert (folder / name).read_bytes() == b"mine"
        (folder / name).unlink()


def test_the_state_stays_until_all_processes_have_a_finished_stage(tmp_path: Path) -> None:
    """One that comes later must still find that the training is done."""
    seen = []

    class Late(World):
        def barrier(self) -> None:
            seen.append((folder / "state.safetensors").exists())

    folder = tmp_path / "net.run"
    with Run(folder, identity=IDENTITY, resume=False, world=Late()) as run:
        run.save("a", State())
        seen.clear()
        run.finish("a", small(1))
    assert seen == [True]
    assert not (folder / "state.safetensors").exists()


def test_success_leaves_the_metrics_alone(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.save("a", State())
    run.finish("b", small(1))
    run.log.add("a", 1, 10, loss=0.5)
    run.close()
    assert files(tmp_path) == ["metrics.jsonl"]
    assert json.loads(run.metrics.read_text())["loss"] == 0.5
    with pytest.raises(UsageError, match=r"log of an earlier run.*force=True"):
        start(tmp_path)
    run = Run(tmp_path / "net.run", identity=IDENTITY, resume=False, force=True)
    assert not run.metrics.exists()
    run.close()
    assert not (tmp_path / "net.run").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(OutputError, match="another run is at work here"):
        start(tmp_path, resume=True)
    start(tmp_path).close()


def test_a_killed_run_lets_go_at_once_though_its_workers_live_on(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    go, stay = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: other threads are not copied
        child = os.fork()
        if child == 0:
            try:
                run = start(tmp_path)
                run.save("a", State())
                os.close(stay)
                if os.fork() == 0:  # a data worker
                    os.write(tell, b"!")
                os.read(go, 1)
            finally:
                os._exit(0)
    assert os.read(ready, 1) == b"!"
    with pytest.raises(OutputError):
        start(tmp_path, resume=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with start(tmp_path, resume=True) as run:
        assert run.load("a") is not None
    for handle in (stay, go, ready, tell):
        os.close(handle)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    other = World(rank=1, size=1)
    with Run(tmp_path / "net.run", identity=IDENTITY, resume=False, world=other) as run:
        run.save("a", State())
        run.finish("b", small(1))
        run.log.add("a", 1, 1, loss=1.0)
        run.close()
    assert list(tmp_path.iterdir()) == []
    with start(tmp_path) as run:
        run.finish("b", small(1))
        theirs = Run(tmp_path / "net.run", identity={}, resume=True, world=other)
        assert theirs.finished("b") is not None


def test_a_run_that_cannot_start_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise EnvironmentFailure("TensorBoard is not installed")

    with monkeypatch.context() as patch:
        patch.setattr("modelopt_cli.training.run_folder.MetricsLog", missing)
        with pytest.raises(EnvironmentFailure) as caught:
            start(tmp_path)
    assert caught.value.__traceback__ is not None  # which keeps the run that failed alive
    start(tmp_path).close()


def test_a_run_with_nothing_to_go_on_from_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log.add("a", 1, 10, loss=0.5)
    assert list(tmp_path.iterdir()) == []


def test_one_that_could_go_on_keeps_all_until_it_is_discarded(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log.add("a", 1, 10, loss=0.5)
        run.save("a", State())
    assert files(tmp_path) == ["identity.json", "metrics.jsonl", "state.safetensors"]
    with start(tmp_path, resume=True) as run:
        run.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_folder_keeps_the_log_of_an_earlier_run(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log.add("a", 1, 10, loss=0.5)
        run.close()
    with pytest.raises(UsageError, match="log of an earlier run"):
        start(tmp_path)
    assert files(tmp_path) == ["metrics.jsonl"]


def test_an_identity_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise EnvironmentFailure("no space left")

    monkeypatch.setattr("modelopt_cli.training.run_folder.atomic_write", full)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "net.run").write_text("a file")
    with pytest.raises(OutputError, match="is not a folder"):
        start(tmp_path)
    with pytest.raises(EnvironmentFailure, match="No such file"):
        start(tmp_path / "missing")


@pytest.mark.parametrize("stage", ["", "../a", "a/b", ".a", "a" * 101])
def test_a_stage_has_a_name_that_is_a_file_name(tmp_path: Path, stage: str) -> None:
    with start(tmp_path) as run, pytest.raises(ModeloptError, match="cannot name a stage"):
        run.finish(stage, small(1))
