"""Work that fails leaves its outputs as they were: absent or old, byte for byte, and nothing next to them."""

import errno
import os
from pathlib import Path

import pytest

from modelopt_cli.artifact.undo import undone_on_failure
from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import GateNotMet, OutputError

LONG_AGO = 1_000_000_000


def old_file(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.utime(path, (LONG_AGO, LONG_AGO))


def require_old(path: Path) -> None:
    status = path.stat()
    assert path.read_bytes() == b"old"
    assert (status.st_mode & 0o777, status.st_mtime) == (0o640, LONG_AGO)  # make goes by the time


def write_and_fail(error: BaseException, *paths: Path) -> None:
    with undone_on_failure(*paths):
        for path in paths:
            atomic_write(path, [b"new"], True)
            assert path.read_bytes() == b"new"
        raise error


def fail(path: Path, error: BaseException) -> list[str]:
    with pytest.raises(type(error)) as caught:
        write_and_fail(error, path)
    return list(getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize("error", [GateNotMet("no"), KeyboardInterrupt(), ValueError()], ids=repr)
def test_a_new_file_goes(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out"
    assert fail(path, error) == [f"{path} was deleted again"]
    assert os.listdir(tmp_path) == []


def test_an_old_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "out"
    old_file(path)
    assert fail(path, GateNotMet("no")) == [f"the earlier {path} is back"]
    require_old(path)
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_file_comes_back_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    path = tmp_path / "out"
    old_file(path)
    monkeypatch.setattr(os, "link", refuse)
    fail(path, GateNotMet("no"))
    require_old(path)
    assert os.listdir(tmp_path) == ["out"]


def test_success_keeps_the_new_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    old_file(path)
    with undone_on_failure(path):
        atomic_write(path, [b"new"], True)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_not_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    old_file(path)
    with pytest.raises(OutputError), undone_on_failure(path):
        atomic_write(path, [b"new"], False)
    require_old(path)
    assert os.listdir(tmp_path) == ["out"]


def test_what_another_process_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def write() -> None:
        with undone_on_failure(path):
            path.write_bytes(b"theirs")
            atomic_write(path, [b"new"], False)

    with pytest.raises(OutputError):
        write()
    assert path.read_bytes() == b"theirs"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    old_file(path)
    link.symlink_to("out")
    fail(link, GateNotMet("no"))
    assert link.is_symlink()
    require_old(path)


def test_a_name_that_a_killed_process_left_is_not_taken(tmp_path: Path) -> None:
    path, left = tmp_path / "out", tmp_path / ".out.0.old"
    old_file(path)
    left.write_bytes(b"older")
    fail(path, GateNotMet("no"))
    require_old(path)
    assert left.read_bytes() == b"older"
    assert sorted(os.listdir(tmp_path)) == [".out.0.old", "out"]


def test_all_outputs_are_taken_back(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    old_file(second)
    with pytest.raises(GateNotMet):
        write_and_fail(GateNotMet("no"), first, second)
    assert not first.exists()
    require_old(second)
