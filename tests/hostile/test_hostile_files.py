"""The corpus: every hostile file ends in exit 2 or 3 and one line, writes nothing and runs nothing.

``make fuzz`` goes on with other seeds.
"""

import os
import random
import signal
import time

import pytest
import torch
from hostile_faults import faults
from hostile_files import GENERATORS, good_files, small_state
from quick_cases import quick

from modelopt_cli import artifact

EVERY = 4
"""The quick tests read every fourth file of the corpus."""


@pytest.mark.parametrize("part", quick(["every fourth", "the others"], ["every fourth"]))
@pytest.mark.parametrize("kind", GENERATORS)
def test_corpus(kind, part, tmp_path):
    (tmp_path / "work").mkdir()
    canary = tmp_path / "canary"
    wrong = {}
    for number, (name, data) in enumerate(GENERATORS[kind](random.Random(0), canary)):
        if (number % EVERY == 0) != (part == "every fourth"):
            continue
        commands = number % 48 == 0
        found = faults(kind, data, tmp_path / "work", canary, command_line=commands)
        if found:
            wrong[name] = found
    assert not wrong


def test_good_files_are_read(tmp_path):
    """What the corpus damages is in order, or every refusal would say nothing."""
    for name, data in good_files().items():
        for folder in ("good", "bad"):
            (tmp_path / name / folder).mkdir(parents=True)
        good, bad = tmp_path / name / "good", tmp_path / name / "bad"
        assert faults("mutations", data, good, tmp_path / "canary", command_line=True) == [], name
        assert faults("flips", data, bad, tmp_path / "canary"), name


def test_killed_at_any_moment_a_file_is_absent_old_or_whole(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    states = [small_state(), {name: tensor + 1 for name, tensor in small_state().items()}]
    for turn in range(12):
        child = os.fork()
        if child == 0:
            while True:
                artifact.write_tensors(states[turn % 2], {}, path, force=True)
        time.sleep(rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            found = artifact.read_tensors(path).state
            assert any(all(torch.equal(found[name], state[name]) for name in state) for state in states)
    artifact.write_tensors(states[0], {}, path, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
