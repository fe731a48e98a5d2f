"""What only a process of its own can show: signals, pipes, streams, imports, start-up time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

READY = "open('ready', 'w').close()"


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_cleans_up_and_says_so(number, code, line, process, tmp_path):
    body = f"try:\n    {READY}\n    time.sleep(60)\nfinally:\n    open('cleaned', 'w').close()"
    child = process("probe", body=body)
    wait_for(tmp_path / "ready", child)
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.decode()) == (code, b"", f"error: {line}\n")
    assert (tmp_path / "cleaned").exists()


def test_a_second_sigterm_ends_a_cleanup_that_hangs(process, tmp_path):
    hang = "open('cleaning', 'w').close()\n    time.sleep(60)"
    body = f"try:\n    {READY}\n    time.sleep(60)\nfinally:\n    {hang}"
    child = process("probe", body=body)
    for name in ("ready", "cleaning"):
        wait_for(tmp_path / name, child)
        child.terminate()
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGTERM


def test_a_closed_pipe_ends_quietly_with_141(process):
    child = process("probe", body="for _ in range(100000):\n    console.result('line')")
    assert child.stdout is not None
    assert child.stdout.readline() == b"line\n"
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(timeout=30) == 141


def test_a_pipe_closed_before_the_help_is_141(process):
    read, write = os.pipe()
    os.close(read)
    child = process("--help", stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["probe"], ["--help"]], ids=" ".join)
def test_a_full_disk_behind_stdout_is_3(argv, process):
    with open("/dev/full", "wb") as full:
        child = process(*argv, body="console.result('answer')", stdout=full)
        _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (3, b"error: no space left on device\n")


def test_what_is_left_unwritten_at_the_end_is_not_complained_about(process):
    read, write = os.pipe()
    os.close(read)
    child = process("probe", body="sys.__stdout__.write('left over')", stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, b"")


def test_what_user_code_prints_is_no_result(process):
    child = process("probe", "--json", body="print('loading')\nconsole.result_json({'a': 1})")
    out, err = child.communicate(timeout=30)
    assert (json.loads(out), err) == ({"a": 1}, b"loading\n")


def test_closed_streams_are_no_error(environ):
    command = f"{sys.executable} -m modelopt_cli --version >&- 2>&-"
    assert subprocess.run(command, shell=True, env=environ, check=False).returncode == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["eval", "--help"],
        ["quantise"],
        ["eval", "a", "--crop", "x"],
        ["eval", "nothing.pth"],
        ["inspect", "nothing.pth"],
        ["quantize", "nothing.pth"],
        ["quantize", ".", "-o", "nowhere/x.safetensors"],
        ["prune", ".", "--sparsity", "0.5", "-o", "nowhere/x.safetensors"],
        ["share", ".", "--bits", "4", "-o", "nowhere/x.safetensors"],
        ["prune", "nothing.pth", "--flops", "0.5", "--train", "digits", "--epochs", "1"],
        ["train", "--arch", "builtin:resnet8", "--train", "digits", "-o", "nowhere/x.safetensors"],
    ],
    ids=" ".join,
)
def test_what_needs_no_network_imports_no_torch(argv, environ):
    script = (
        "import sys\n"
        "from modelopt_cli.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], env=environ, capture_output=True, text=True, check=False
    )
    assert "imported" not in done.stderr
    assert done.returncode in (0, 2)


def test_help_answers_soon(environ, record_property):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "modelopt_cli", "--help"], env=environ, capture_output=True, check=True
        )
        times.append(time.perf_counter() - begin)
    # Recorded, not asserted: 0.5 s is the aim, and a busy machine may miss it. Torch alone takes far longer.
    record_property("help_seconds_median", sorted(times)[2])


def test_warnings_of_other_libraries_are_kept_from_the_user(process):
    body = "import warnings\nwarnings.warn('old', DeprecationWarning)\nconsole.result('answer')"
    assert process("probe", body=body).communicate(timeout=30) == (b"answer\n", b"")
    _, err = process("probe", "--debug", body=body + "\nwarnings.warn('seen')").communicate(timeout=30)
    assert b"seen" in err


def test_the_module_and_the_function_are_the_same_command(environ):
    done = subprocess.run(
        [sys.executable, "-m", "modelopt_cli", "--version"],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("modelopt ")
