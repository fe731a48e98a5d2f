"""Networks that `make assets` fetches: quantized from the shell, judged, and loaded elsewhere."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import modelopt_cli
from benchmarks.real_networks import NETWORKS, ROOT, lost, run
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.program.samples import noise

pytestmark = [pytest.mark.assets, pytest.mark.slow]

ELSEWHERE = """
import sys, torch, modelopt_cli
from modelopt_cli.program.input_batch import call
program = modelopt_cli.load(sys.argv[1])
torch.save(call(program, torch.load("inputs.pt")), "outputs.pt")
assert not any(name.split(".")[0] in ("benchmarks", "transformers") for name in sys.modules)
"""


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.training is None])
def test_int8_loses_at_most_a_hundredth_and_loads_without_the_source(name, tmp_path, monkeypatch):
    network = NETWORKS[name]
    if not (ROOT / network.checkpoint).exists():
        pytest.skip(f"{network.checkpoint} is not there; run: make assets")
    missing = [package for package in network.needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    found = run(name, "int8", tmp_path)
    before, after = found["evaluation"]["models"]
    assert before["metrics"][network.metric] == pytest.approx(network.fp32, rel=1e-3)
    assert lost(found, network.metric) <= network.loses
    monkeypatch.chdir(tmp_path)
    program = modelopt_cli.load(after["path"])
    inputs = noise(program.input, 2, seed=0)
    torch.save(inputs, "inputs.pt")
    command = [sys.executable, "-c", ELSEWHERE, after["path"]]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    outputs = flatten(call(program, inputs))
    assert outputs
    again = flatten(torch.load("outputs.pt"))
    assert all(torch.equal(again[place], output) for place, output in outputs.items())
