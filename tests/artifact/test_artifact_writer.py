"""The atomic writer: absent, old or whole, whatever happens."""

import errno
import fcntl
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelopt_cli.artifact import writer
from modelopt_cli.artifact.output_path import check_output
from modelopt_cli.artifact.writer import atomic_write
from modelopt_cli.errors import EnvironmentFailure, OutputError

REPO = Path(__file__).resolve().parents[2]


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(".part")]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "net.safetensors"


def test_writes_chunks_in_order_and_leaves_nothing_else(target):
    atomic_write(target, [b"one", bytearray(b""), memoryview(b"two")])
    assert target.read_bytes() == b"onetwo"
    assert os.listdir(target.parent) == [target.name]


def test_writes_chunks_of_wider_elements_as_bytes(target):
    atomic_write(target, [memoryview(b"\1\0\0\0\2\0\0\0").cast("i")])
    assert target.read_bytes() == b"\1\0\0\0\2\0\0\0"


def test_existing_file_needs_force(target):
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists"):
        atomic_write(target, [b"new"])
    assert target.read_bytes() == b"old"
    atomic_write(target, [b"new"], force=True)
    assert target.read_bytes() == b"new"


def test_file_that_appears_while_writing_is_not_replaced(target):
    def chunks():
        yield b"new"
        target.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="already exists"):
        atomic_write(target, chunks())
    assert target.read_bytes() == b"theirs"
    assert leftovers(target.parent) == []


@pytest.mark.parametrize("force", [False, True])
def test_works_without_hard_links(target, monkeypatch, force):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    atomic_write(target, [b"new"], force=force)
    assert target.read_bytes() == b"new"


def test_without_hard_links_a_file_that_appeared_is_kept(target, monkeypatch):
    def no_links(*_, **__):
        target.write_bytes(b"theirs")
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputError, match="already exists"):
        atomic_write(target, [b"new"])
    assert target.read_bytes() == b"theirs"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_file_gets_the_mode_of_the_umask(target, mask):
    before = os.umask(mask)
    try:
        atomic_write(target, [b"new"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_replaced_file_keeps_its_mode(target, mode):
    target.write_bytes(b"old")
    target.chmod(mode)
    atomic_write(target, [b"new"], force=True)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "file", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    atomic_write(link, [b"new"], force=True)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert leftovers(tmp_path) == leftovers(tmp_path / "real") == []


@pytest.mark.parametrize("make", ["directory", "fifo", "socket", "link to nothing", "link loop"])
@pytest.mark.parametrize("force", [False, True])
def test_refuses_what_is_not_a_regular_file(target, make, force):
    if make == "directory":
        target.mkdir()
    elif make == "fifo":
        os.mkfifo(target)
    elif make == "socket":
        here = os.getcwd()
        os.chdir(target.parent)  # socket paths are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(target.name)
        os.chdir(here)
    elif make == "link to nothing":
        target.symlink_to(target.with_name("nothing"))
    else:
        target.symlink_to(target)
    before = os.lstat(target)
    with pytest.raises(OutputError):
        check_output(target, force)
    with pytest.raises(OutputError):
        atomic_write(target, [b"new"], force)
    assert os.lstat(target).st_ino == before.st_ino
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/", ".", "", "a\0b"])
def test_refuses_devices_folders_and_empty_names_even_with_force(path):
    with pytest.raises(OutputError):
        check_output(path, force=True)


def test_refuses_a_missing_folder_and_a_file_as_folder(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "no" / "net")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="not a directory"):
        check_output(tmp_path / "file" / "net")


@pytest.mark.parametrize("kind", ["same name", "hard link", "symbolic link"])
def test_refuses_an_input_even_with_force(tmp_path, kind):
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"precious")
    if kind == "same name":
        output = source
    elif kind == "hard link":
        output.hardlink_to(source)
    else:
        output.symlink_to(source)
    with pytest.raises(OutputError, match="also an input"):
        check_output(output, True, inputs=[tmp_path / "missing", source])


def test_name_that_leaves_no_room_for_the_part_file_is_refused_early(tmp_path):
    with pytest.raises(EnvironmentFailure, match="too long"):
        check_output(tmp_path / ("n" * 252))
    check_output(tmp_path / ("n" * 249))


def test_folder_without_permission_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EnvironmentFailure, match="permission denied"):
        check_output(tmp_path / "net")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_folder_of_somebody_else_is_refused_in_earnest(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "from modelopt_cli.artifact import writer; from modelopt_cli.errors import EnvironmentFailure;"
        "folder = os.open(sys.argv[2], os.O_RDONLY); os.fchdir(folder); os.setuid(65534)\n"
        "try: writer.atomic_write('net', [b'x'])\n"
        "except EnvironmentFailure as error: print(error)"
    )
    tmp_path.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-c", script, str(REPO), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "permission denied" in run.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_failing_write_leaves_the_old_file_and_says_why_in_one_line(target, monkeypatch, number, says):
    target.write_bytes(b"old")
    real, calls = os.write, []

    def failing(handle, data):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))
        return real(handle, data[:3])

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(EnvironmentFailure, match=says) as caught:
        atomic_write(target, [b"a new content"], force=True)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old"
    assert leftovers(target.parent) == []


def test_short_writes_are_continued(target, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    atomic_write(target, [b"a content in many pieces"])
    assert target.read_bytes() == b"a content in many pieces"


def test_file_size_limit_leaves_nothing(tmp_path):
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]);"
        "from modelopt_cli.artifact import writer; from modelopt_cli.errors import EnvironmentFailure;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try: writer.atomic_write(sys.argv[2], [bytes(1 << 20)])\n"
        "except EnvironmentFailure as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(REPO), str(tmp_path / "net")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "size limit" in run.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_any_exception_while_writing_leaves_things_as_they_were(target, kind):
    target.write_bytes(b"old")

    def chunks():
        yield b"half"
        raise kind

    with pytest.raises(kind):
        atomic_write(target, chunks(), force=True)
    assert target.read_bytes() == b"old"
    assert leftovers(target.parent) == []


def test_file_that_does_not_verify_is_not_published(target):
    def verify(part):
        assert part.read_bytes() == b"new"
        raise ValueError("not what was meant")

    with pytest.raises(ValueError, match="not what was meant"):
        atomic_write(target, [b"new"], verify=verify)
    assert os.listdir(target.parent) == []


def test_leftover_of_a_killed_writer_is_cleared(target):
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(b"half of something much longer")
    atomic_write(target, [b"new"])
    assert target.read_bytes() == b"new"
    assert leftovers(target.parent) == []


def test_writer_at_work_is_not_disturbed(target):
    def chunks():
        yield b"mine"
        with pytest.raises(OutputError, match="another modelopt is writing"):
            atomic_write(target, [b"theirs"])
        yield b", whole"

    atomic_write(target, chunks())
    assert target.read_bytes() == b"mine, whole"
    assert leftovers(target.parent) == []


def test_lock_of_another_process_counts(target):
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another modelopt is writing"):
            atomic_write(target, [b"new"])
        assert part.exists()


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_part_name_taken_by_something_else_is_left_alone(target, kind):
    part, bystander = target.with_name(f".{target.name}.part"), target.with_name("bystander")
    bystander.write_bytes(b"precious")
    {"link": lambda: part.symlink_to(bystander), "directory": part.mkdir, "fifo": lambda: os.mkfifo(part)}[
        kind
    ]()
    with pytest.raises(OutputError, match="in the way"):
        atomic_write(target, [b"new"])
    assert bystander.read_bytes() == b"precious"
    assert not target.exists()


def test_file_system_without_locks_still_writes_but_never_clears(target, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(writer.fcntl, "flock", no_locks)
    atomic_write(target, [b"new"])
    assert target.read_bytes() == b"new"
    target.with_name(f".{target.name}.part").write_bytes(b"whose?")
    with pytest.raises(OutputError, match="left by another writer"):
        atomic_write(target, [b"newer"], force=True)
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("cause", [errno.EIO, errno.EINTR, errno.EDEADLK])
def test_failing_lock_leaves_no_part_file(target, monkeypatch, cause):
    def fail(*_):
        raise OSError(cause, "no")

    monkeypatch.setattr(writer.fcntl, "flock", fail)
    with pytest.raises(EnvironmentFailure, match="cannot write"):
        atomic_write(target, [b"new"])
    assert list(target.parent.iterdir()) == []


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from modelopt_cli.artifact.writer import atomic_write
assert "torch" not in sys.modules
turn = 0
print("ready", flush=True)
while True:
    turn = (turn + 1) % 250
    atomic_write(sys.argv[2], (bytes([turn + 1]) * (1 << 16) for _ in range(16)), force=True)
"""


@pytest.mark.slow
def test_fifty_kills_never_leave_a_broken_file(tmp_path):
    target = tmp_path / "net"
    target.write_bytes(b"\0" * (1 << 20))
    chance = random.Random(0)
    kept_leftover = seen_new = 0
    for _ in range(50):
        with subprocess.Popen(
            [sys.executable, "-S", "-c", KILLED, str(REPO), str(target)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        content = target.read_bytes()
        assert len(content) == 1 << 20
        assert content.count(content[0]) == len(content)
        assert len(leftovers(tmp_path)) <= 1
        kept_leftover += len(leftovers(tmp_path))
        seen_new += content[0] != 0
    assert kept_leftover > 0  # otherwise no kill ever hit a write
    assert seen_new > 0
    atomic_write(target, [b"whole"], force=True)
    assert os.listdir(tmp_path) == ["net"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    target = tmp_path / "net"
    script = (
        KILLED.replace("while True:", "for _ in range(200):").replace(
            "    atomic_write(", "    try: atomic_write("
        )
        + "    except Exception as error: assert 'another modelopt' in str(error), error\n"
    )
    command = [sys.executable, "-S", "-c", script, str(REPO), str(target)]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    content = target.read_bytes()
    assert content.count(content[0]) == len(content) == 1 << 20
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_content_is_synced_before_it_is_published_and_the_folder_after(target, monkeypatch, force):
    calls = []

    def record(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            old = target.read_bytes() if target.exists() else None
            calls.append(("fsync folder" if folder else name, old))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    if force:
        target.write_bytes(b"old")
    for name in ("write", "fsync", "link", "replace", "unlink"):
        record(name)
    atomic_write(target, [b"new"], force)
    before = b"old" if force else None
    publish = [("replace", before)] if force else [("link", before), ("unlink", b"new")]
    assert calls == [("write", before), ("fsync", before), *publish, ("fsync folder", b"new")]
