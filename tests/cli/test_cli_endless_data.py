"""Data without a length may never end: a line says so before they are evaluated on, and what ends it."""

import pytest

ENDLESS = """
import torch

class Flow:
    def __iter__(self):
        index = 0
        while True:
            if index == 1000:  # as somebody would at some time
                raise KeyboardInterrupt
            yield torch.zeros(1, 8, 8), index % 10
            index += 1

class Sized(Flow):
    def __len__(self):
        return 20

    def __iter__(self):
        return ((torch.zeros(1, 8, 8), index % 10) for index in range(20))

class Ends(Sized):
    __len__ = None
"""
HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1", "--latency-runs", "0"]
OUT = ["-o", "out.safetensors"]
COMMANDS = {
    "eval": ["eval", "net.pth", *HOW],
    "quantize": ["quantize", "net.pth", *HOW, *OUT],
    "train": ["train", "net.pth", *HOW, "--train", "digits?split=train", "--epochs", "1", *OUT],
}
NOTE = "flow.py:Flow has no length: the evaluation goes on until it ends, if it does; --limit ends it"


@pytest.fixture
def flow(here):
    """A folder with a network and ``flow.py``."""
    (here / "flow.py").write_text(ENDLESS)
    return here


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_may_never_end_is_said_before_it_is_read(flow, modelopt, command):
    outcome = modelopt(*command, "--data", "flow.py:Flow")
    assert outcome.code == 130, outcome.err
    assert outcome.err.count(NOTE) == 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_limit_ends_it_in_silence(flow, modelopt, command):
    outcome = modelopt(*command, "--data", "flow.py:Flow", "--limit", "40")
    assert outcome.code == 0, outcome.err
    assert "no length" not in outcome.err


@pytest.mark.parametrize(("name", "said"), [("Sized", False), ("Ends", True)])
def test_what_says_how_long_it_is_ends(flow, modelopt, name, said):
    outcome = modelopt("eval", "net.pth", *HOW, "--data", f"flow.py:{name}")
    assert outcome.code == 0, outcome.err
    assert ("no length" in outcome.err) is said


def test_validation_that_may_never_end_is_said_too(flow, modelopt):
    outcome = modelopt(*COMMANDS["train"], "--no-eval", "--val", "flow.py:Flow")
    assert outcome.code == 130, outcome.err
    assert "flow.py:Flow has no length: every validation goes on until it ends" in outcome.err
