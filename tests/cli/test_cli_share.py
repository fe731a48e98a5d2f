"""``modelopt share``: what it writes and prints, plans, refuses, and how it goes on."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from folder_contents import digest, names
from quick_cases import quick
from safetensors.torch import load_file, save_file

import modelopt_cli
from modelopt_cli.artifact import read_tensors
from modelopt_cli.data import open_data
from modelopt_cli.methods.share import codebook_tuning
from modelopt_cli.program import InputSpec, Program

HOW = ["--arch", "net.py:make?width=16", "--input-size", "8", "--channels", "1"]
TUNE = ["--train", "digits?split=train", "--lr", "0.01"]
QUICK = ["--latency-runs", "0"]
OUT = ["-o", "out.safetensors"]


def train(good_files, folder, width, epochs):
    """A trained network in a folder, as an artifact and as a bare state dict."""
    from modelopt_cli.cli.main import main

    shutil.copy(good_files / "net.py", folder)
    how = ["--arch", f"{folder / 'net.py'}:make?width={width}", *HOW[2:], "--train", "digits?split=train"]
    how += ["--lr", "0.05", "--epochs", str(epochs), "--no-eval", "-q"]
    assert main(["train", *how, "-o", str(folder / "net.safetensors")]) == 0
    torch.save(dict(modelopt_cli.load(folder / "net.safetensors").state_dict()), folder / "net.pth")
    return folder


@pytest.fixture(scope="module")
def trained(good_files, tmp_path_factory):
    """A folder with a trained network of width 16."""
    return train(good_files, tmp_path_factory.mktemp("trained"), 16, 10)


@pytest.fixture(scope="module")
def wide(good_files, tmp_path_factory):
    """A folder with one of width 256: of smaller ones a compressed file is mostly header."""
    return train(good_files, tmp_path_factory.mktemp("wide"), 256, 5)


@pytest.fixture
def here(trained, enter):
    """A copy of the trained network as the current directory."""
    return enter(trained)


def digits_of(split):
    data = open_data(f"digits?split={split}", input_spec=InputSpec((1, 8, 8)), seed=0)
    return next(iter(data.batches(1 << 12)))


def test_it_ends_with_the_table_and_says_what_it_wrote(here, modelopt):
    command = [
        "share",
        "net.safetensors",
        "--bits",
        "3",
        "--data",
        "digits",
        *QUICK,
        "-v",
        "--export",
        "t.json",
    ]
    outcome = modelopt(*command)
    assert outcome.code == 0, outcome.err
    assert "net-shared.safetensors" in outcome.out
    lines = outcome.err.splitlines()
    assert any(
        line.split() == ["layer", "kind", "weights", "values", "bits", "error", "why", "left"]
        for line in lines
    )
    assert any(line.startswith("3 of 3 layers shared; ") for line in lines)
    size = (here / "net-shared.safetensors").stat().st_size
    assert lines[-1] == f"wrote net-shared.safetensors ({size:,} bytes)"
    base, result = json.loads((here / "t.json").read_text())["models"]
    assert result["file_bytes"] < 0.2 * base["file_bytes"]
    assert abs(base["top1"] - result["top1"]) < 8
    program = modelopt_cli.load("net-shared.safetensors")
    assert [entry["method"] for entry in program.history] == ["train", "share"]
    assert all(len(program.get_parameter(f"{layer}.weight").unique()) == 8 for layer in ("0", "2", "5"))


PLANS = {
    "bits": ["--bits", "3"],
    "vectors": ["--bits", "4", "--vector", "8", "--exclude", "0"],
    "auto": ["--bits", "auto", "--bytes", "0.7", "--calibration", "digits"],
}


CODES = ("plain", "packed", "entropy")


@pytest.mark.parametrize(
    ("plan", "code"), quick(product(PLANS, CODES), [*product(["bits", "vectors"], CODES), ("auto", "packed")])
)
def test_dry_run_knows_the_size_and_writes_nothing(plan, code, here, modelopt):
    before = names(here)
    command = ["share", "net.safetensors", *PLANS[plan], "--code", code, "--json", "-q"]
    planned = json.loads(modelopt(*command, "--dry-run").out)
    assert names(here) == before
    assert planned["output"] is planned["evaluation"] is None
    done = json.loads(modelopt(*command, "--no-eval", *OUT).out)
    assert done["output"]["file_bytes"] == planned["predicted_bytes"]
    assert done["layers"] == planned["layers"]


@pytest.mark.slow
def test_as_json_it_is_one_object(here, modelopt):
    how = [
        "--bits",
        "auto",
        "--ratio",
        "8",
        "--calibration",
        "digits?split=train",
        "--no-eval",
        "--json",
        "-q",
    ]
    outcome = modelopt("share", "net.safetensors", *how, *OUT)
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert data["schema_version"] == 1
    assert data["output"]["sha256"] == digest(here / "out.safetensors")
    assert (
        data["predicted_bytes"] == data["output"]["file_bytes"] == (here / "out.safetensors").stat().st_size
    )
    full = (here / "net.safetensors").stat().st_size
    assert 0.93 / 8 < data["predicted_bytes"] / full <= 1 / 8
    assert data["target"]["metric"] == "bytes"
    assert data["target"]["reached"] == pytest.approx(data["predicted_bytes"] / full, abs=1e-3)
    state = modelopt_cli.load("out.safetensors").state_dict()
    for layer in data["layers"]:
        weight = state[f"{layer['name']}.weight"]
        assert layer["weights"] == weight.numel()
        counts = weight.unique(return_counts=True)[1].double()
        assert layer["values"] == len(counts)
        shares = counts / counts.sum()
        assert layer["bits"] == pytest.approx(float(-(shares * shares.log2()).sum()))
        assert layer["reason"] == ""


@pytest.mark.slow
def test_max_drop_is_the_budget_where_there_is_no_other(here, modelopt):
    command = [
        "share",
        "net.safetensors",
        "--bits",
        "auto",
        "--calibration",
        "digits?split=train",
        "--max-drop",
        "2",
    ]
    data = json.loads(modelopt(*command, "--dry-run", "--json", "-q").out)
    assert data["target"]["metric"] == "max_drop"
    assert data["target"]["reached"] <= 2
    assert data["predicted_bytes"] < 0.25 * (here / "net.safetensors").stat().st_size
    data = json.loads(modelopt(*command, "--ratio", "12", "--dry-run", "--json", "-q").out)
    assert data["target"]["metric"] == "bytes"


@pytest.mark.slow
def test_max_drop_without_data_to_judge_by_is_the_budget_alone(here, modelopt):
    command = [
        "share",
        "net.safetensors",
        "--bits",
        "auto",
        "--calibration",
        "digits",
        "--max-drop",
        "5",
        *OUT,
        "-q",
    ]
    outcome = modelopt(*command, "--no-eval")
    assert outcome.code == 0, outcome.err
    refused = modelopt(*command, "--no-eval", "--ratio", "9", "--force")
    assert (refused.code, "a gate needs the result" in refused.err) == (2, True)


def test_max_drop_is_the_gate_always(here, modelopt):
    command = [
        "share",
        "net.safetensors",
        "--centroids",
        "2",
        "--data",
        "digits",
        *QUICK,
        "--max-drop",
        "0.1",
    ]
    outcome = modelopt(*command, *OUT, "-q")
    assert outcome.code == 1
    assert "drop" in outcome.err
    assert (here / "out.safetensors").exists()


@pytest.mark.parametrize("tune", ["epoch", "dkm"])
def test_auto_is_tuned_with_its_assignments_only(tune, here, modelopt):
    how = ["--bits", "auto", "--ratio", "9", *TUNE, "--epochs", "1", "--tune", tune]
    outcome = modelopt("share", "net.safetensors", *how, *OUT)
    assert outcome.code == 2
    assert f"--tune {tune} assigns weights again" in outcome.err
    assert not (here / "out.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "tune", "network"),
    [
        pytest.param(["--bits", "1"], "fixed", "trained", id="bits-fixed"),
        pytest.param(["--bits", "1"], "epoch", "trained", id="bits-epoch"),
        pytest.param(["--bits", "1"], "dkm", "trained", id="bits-dkm"),
        pytest.param(["--bits", "auto", "--ratio", "24"], "fixed", "wide", id="auto-fixed"),
    ],
)
def test_fine_tuned_it_keeps_few_values_and_gets_better(how, tune, network, enter, modelopt, request):
    here = enter(request.getfixturevalue(network))
    command = ["share", "net.safetensors", *how, "--calibration", "digits", "--no-eval", "--json", "-q"]
    assert modelopt(*command, "-o", "rough.safetensors").code == 0
    outcome = modelopt(*command, *TUNE, "--epochs", "3", "--tune", tune, *OUT)
    assert outcome.code == 0, outcome.err
    program = modelopt_cli.load("out.safetensors")
    for layer in json.loads(outcome.out)["layers"]:
        assert len(program.get_parameter(f"{layer['name']}.weight").unique()) <= layer["values"]
        assert layer["values"] <= (2 if how[1] == "1" else 256)
    assert program.history[-1]["training"]["epochs"] == 3
    assert program.history[-1]["config"]["tune"] == tune
    assert names(here / "out.run") == {"metrics.jsonl"}
    images, labels = digits_of("train")
    losses = []
    for name in ("rough", "out"):
        with torch.no_grad():
            logits = modelopt_cli.load(f"{name}.safetensors")(images)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_pruned_zeros_stay_zeros_fine_tuned_or_not(here, modelopt):
    how = ["--structure", "unstructured", "--sparsity", "0.7", "--no-eval"]
    assert modelopt("prune", "net.safetensors", *how, "-o", "sparse.safetensors").code == 0
    before = modelopt_cli.load("sparse.safetensors").state_dict()
    for tune in ([], [*TUNE, "--epochs", "2"], [*TUNE, "--epochs", "2", "--tune", "dkm"]):
        outcome = modelopt("share", "sparse.safetensors", "--bits", "3", *tune, "--no-eval", *OUT, "--force")
        assert outcome.code == 0, outcome.err
        after = modelopt_cli.load("out.safetensors").state_dict()
        for name in ("0.weight", "2.weight", "5.weight"):
            assert not after[name][before[name] == 0].any()
            assert len(after[name].unique()) <= 8


@pytest.mark.slow
def test_interrupted_it_goes_on_to_the_same_bytes(here, modelopt, monkeypatch):
    command = ["share", "net.safetensors", *TUNE, "--epochs", "3", "--no-eval", "-q", "--bits"]
    assert modelopt(*command, "2", "-o", "through.safetensors").code == 0
    step, calls = codebook_tuning.FixedAssignment.after_step, []

    def stopping(self, *args):
        calls.append(0)
        if len(calls) == 20:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(codebook_tuning.FixedAssignment, "after_step", stopping)
    assert modelopt(*command, "2", *OUT).code == 130
    monkeypatch.setattr(codebook_tuning.FixedAssignment, "after_step", step)
    assert modelopt(*command, "3", *OUT, "--resume").code == 2  # begun otherwise
    resumed = modelopt(*command, "2", *OUT, "--resume")
    assert resumed.code == 0, resumed.err
    assert digest(here / "out.safetensors") == digest(here / "through.safetensors")


def test_a_bare_state_dict_is_shared_tensor_by_tensor(here, modelopt):
    half = {name: tensor.half() for name, tensor in torch.load("net.pth").items()}
    save_file(half, "bare.safetensors")
    outcome = modelopt("share", "bare.safetensors", "--bits", "3", "--no-eval", "--json", *OUT)
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    assert data["predicted_bytes"] == (here / "out.safetensors").stat().st_size
    assert [layer["name"] for layer in data["coverage"]] == ["0", "2", "5"]
    stored = read_tensors(Path("out.safetensors"))
    for name, tensor in load_file("bare.safetensors").items():
        assert stored.state[name].dtype == torch.float16
        if name.endswith("weight"):
            assert len(stored.state[name].unique()) == 8
        else:
            assert torch.equal(stored.state[name], tensor)
    planned = modelopt("share", "bare.safetensors", "--bits", "3", "--dry-run")
    assert planned.code == 0
    assert f"the file would have {data['predicted_bytes']:,} bytes" in planned.out
    assert "0      weight" in planned.out or "shared 8" in planned.out


def test_sharded_safetensors_are_shared_tensor_by_tensor(here, modelopt):
    state = torch.load("net.pth")
    parts = {
        "a.safetensors": ["0.weight", "0.bias", "2.weight"],
        "b.safetensors": ["2.bias", "5.weight", "5.bias"],
    }
    folder = here / "sharded"
    folder.mkdir()
    for file, tensors in parts.items():
        save_file({name: state[name] for name in tensors}, folder / file)
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert modelopt("share", "sharded", "--bits", "2", "--no-eval", *OUT).code == 0
    save_file(state, "whole.safetensors")
    assert modelopt("share", "whole.safetensors", "--bits", "2", "--no-eval", "-o", "w.safetensors").code == 0
    both = [read_tensors(Path(name)) for name in ("out.safetensors", "w.safetensors")]
    assert both[0].state.keys() == state.keys()
    assert all(torch.equal(tensor, both[1].state[name]) for name, tensor in both[0].state.items())


@pytest.mark.slow
def test_a_network_that_cannot_be_traced_is_shared_and_measured(here, modelopt):
    (here / "odd.py").write_text(
        (here / "net.py").read_text()
        + "\nclass Odd(nn.Sequential):\n    def forward(self, x):\n"
        + "        y = super().forward(x if x.sum() > 0 else -x)\n"
        + "        return y + 0 * sum(p.sum() for p in self.parameters())\n\n"
        + "def odd():\n    return Odd(*make(width=16))\n"
    )
    how = ["--arch", "odd.py:odd", *HOW[2:]]
    command = ["share", "net.pth", *how, "--no-eval", "--json"]
    outcome = modelopt(*command, "--bits", "3", *OUT)
    assert outcome.code == 0, outcome.err
    assert "cannot be traced" in outcome.err
    network = modelopt_cli.api.load_network(OUT[1], arch="odd.py:odd")
    assert not isinstance(network, Program)
    assert len(network.state_dict()["5.weight"].unique()) == 8
    images, labels = digits_of("test")
    with torch.no_grad():
        assert (network(images).argmax(1) == labels).double().mean() > 0.8
    for more in (["--bits", "auto", "--ratio", "4"], ["--bits", "3", *TUNE, "--epochs", "1"]):
        refused = modelopt(*command, *more, "-o", "b.safetensors")
        assert (refused.code, "needs a network that can be traced" in refused.err) == (2, True)


@pytest.mark.slow
def test_files_of_ours_and_others_are_refused_where_they_would_lose(here, modelopt):
    assert modelopt("share", "net.safetensors", "--bits", "3", "--no-eval", *OUT).code == 0
    for command in (
        ["prune", "out.safetensors", "--sparsity", "0.5"],
        ["train", "out.safetensors", *TUNE, "--epochs", "1"],
    ):
        refused = modelopt(*command, "--no-eval", "-o", "b.safetensors")
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert "is stored as codebook values" in refused.err
        assert not (here / "b.safetensors").exists()
    assert (
        modelopt("quantize", "out.safetensors", "--data", "digits", "--no-eval", "-o", "q.safetensors").code
        == 0
    )
    refused = modelopt("share", "q.safetensors", "--bits", "3", "--no-eval", "-o", "b.safetensors")
    assert refused.code == 1
    assert "the network is quantized already; share first, then quantize" in refused.err


BAD = {
    "no size": ([], 2, "nothing says how large the codebooks are; give --bits or --centroids"),
    "bits of what": (["--bits", "many"], 2, "--bits: 'many' is neither a number nor auto"),
    "too many bits": (["--bits", "9"], 2, "--bits: must be 1 to 8, or auto, not 9"),
    "too many centroids": (["--centroids", "300"], 2, "--centroids: must be at most 256, not 300"),
    "auto without a budget": (["--bits", "auto"], 2, "--bits auto needs a budget"),
    "two budgets": (["--bits", "auto", "--bytes", "0.1", "--ratio", "9"], 2, "--bytes, --ratio exclude"),
    "a budget without auto": (["--bits", "3", "--ratio", "9"], 2, "--ratio has no meaning without"),
    "a budget that cannot be met": (["--bits", "auto", "--ratio", "500"], 1, "does not get smaller than"),
    "another scope": (["--bits", "3", "--scope", "chanels"], 2, "did you mean 'channels'?"),
    "another init": (["--bits", "3", "--init", "random"], 2, "--init: 'random' is not one of linear"),
    "another weighting": (["--bits", "3", "--weighting", "hesian"], 2, "did you mean 'hessian'?"),
    "another tune": (["--bits", "3", "--tune", "soft"], 2, "--tune: 'soft' is not one of fixed, epoch, dkm"),
    "another code": (["--bits", "3", "--code", "zip"], 2, "--code: 'zip' is not one of plain, packed"),
    "a weighting without data": (["--bits", "3", "--weighting", "fisher"], 2, "give --calibration or --data"),
    "a drop without data": (
        ["--bits", "auto", "--max-drop", "1", "--dry-run"],
        2,
        "give --calibration or --data",
    ),
    "vectors of odd rows": (["--bits", "3", "--vector", "7"], 1, "rows of 9 weights cannot be cut into"),
    "rated vectors": (["--bits", "3", "--vector", "4", "--rate", "0.1"], 2, "--vector excludes"),
    "a group without channels": (["--bits", "3", "--group", "4"], 2, "--group has no meaning without"),
    "a glob that matches nothing": (["--bits", "3", "--exclude", "conv*"], 2, "conv*"),
    "nothing left to share": (["--bits", "3", "--exclude", "*"], 1, "no layer can be shared"),
    "epochs without data": (["--bits", "3", "--epochs", "1"], 2, "--epochs: there is nothing to train on"),
    "training without epochs": (["--bits", "3", *TUNE], 2, "--lr has no meaning without --epochs"),
    "tuning without training": (
        ["--bits", "3", "--tune", "dkm"],
        2,
        "--tune: has no meaning without --epochs",
    ),
    "a start for auto": (["--bits", "auto", "--ratio", "9", "--init", "exact"], 2, "--init has no meaning"),
    "no such data": (["--bits", "3", "--weighting", "hessian", "--calibration", "nowhere/"], 2, "nowhere"),
    "a gate without measuring": (["--bits", "3", "--min-ratio", "4"], 2, "a gate needs the result"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_line_and_no_file(case, here, modelopt):
    options, code, says = BAD[case]
    before = names(here)
    how = [] if "--dry-run" in options else ["--no-eval"]
    outcome = modelopt("share", "net.safetensors", *options, *how, *OUT, "-q")
    assert (outcome.code, outcome.out) == (code, "")
    assert says in outcome.err
    assert outcome.err.count("\n") == 1
    assert names(here) == before
