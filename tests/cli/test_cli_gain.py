"""What a method gained is said as it is: of the network alone, of all layers, and where it is nothing."""

import json
import re
from itertools import product

import pytest
import torch
from quick_cases import quick
from safetensors.torch import save_file
from torch import nn

BARE = ["--scheme", "int8-weight", "-o", "out.safetensors"]


def write_large(name: str, size: int, **extra: object) -> dict[str, torch.Tensor]:
    """A checkpoint of two linear layers large enough for a header not to count."""
    network = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
    torch.save({"state_dict": network.state_dict(), **extra}, name)
    return network.state_dict()


def test_an_optimizer_next_to_the_weights_is_no_gain(here, modelopt):
    size = 200
    moments = {i: {m: torch.zeros(size, size) for m in ("exp_avg", "exp_avg_sq")} for i in range(2)}
    states = [{"state": moments, "param_groups": []}]
    state = write_large("last.ckpt", size, optimizer_states=states, **{"pytorch-lightning_version": "2.0"})
    outcome = modelopt("quantize", "last.ckpt", *BARE, "--latency-runs", "0", "--json")
    assert outcome.code == 0, outcome.err
    evaluation = json.loads(outcome.out)["evaluation"]
    before, after = evaluation["models"]
    tensors = sum(t.numel() * t.element_size() for t in state.values())
    stored = 2 * (size * size + 4 * size)  # a byte for each weight, a scale of four for each row
    assert (before["tensor_bytes"], after["tensor_bytes"]) == (tensors, stored)
    assert before["file_bytes"] > 3 * tensors
    assert evaluation["comparisons"][0]["ratio"] == tensors / stored
    assert 3.9 < evaluation["comparisons"][0]["ratio"] < 4


LESS = "warning: only 33.3 % of the weights' bytes are compressed"
SAME = "warning: the file is not smaller than its source"


def write_layers(name: str, count: int) -> None:
    layers = {
        f"{i}.weight": torch.randn(100, 100, generator=torch.Generator().manual_seed(i)) for i in range(count)
    }
    torch.save(layers, name)


METHODS = {
    "quantize": ["quantize", "n.pth", "--scheme", "int8-weight"],
    "prune": ["prune", "n.pth", "--structure", "unstructured", "--sparsity", "0.5"],
    "share": ["share", "n.pth", "--bits", "4"],
}


@pytest.mark.parametrize(
    "how", [["--no-eval"], ["--latency-runs", "0"], ["--dry-run"]], ids=lambda how: how[0]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_says_how_much_it_covered(here, modelopt, method, how):
    write_layers("n.pth", 3)
    one = [*method, "--include", "0", "-o", "o.safetensors", *how]
    outcome = modelopt(*one)
    said = outcome.err + outcome.out
    assert outcome.code == 0, said
    assert "compressed 1 of 3 layers, 33.3 % of the weights' bytes" in said
    assert "  not 2 layers, 66.7 %: not matched by --include" in said
    assert LESS in said
    outcome = modelopt(*one, "--json", "--force" if "--dry-run" not in how else "-q")
    data = json.loads(outcome.out)
    assert {key: data["compressed"][key] for key in ("layers", "of_layers")} == {"layers": 1, "of_layers": 3}
    assert (data["compressed"]["bytes"], data["compressed"]["of_bytes"]) == (40_000, 120_000)
    assert data["compressed"]["left_out"][0]["layers"] == 2
    assert LESS in data["notes"]


def test_half_of_the_weights_is_no_cause_for_a_warning(here, modelopt):
    write_layers("n.pth", 2)
    outcome = modelopt(*METHODS["quantize"], "--include", "0", "--no-eval", "-o", "o.safetensors")
    assert "compressed 1 of 2 layers, 50.0 %" in outcome.err
    assert "warning" not in outcome.err


@pytest.mark.parametrize(
    "how", [["--no-eval"], ["--latency-runs", "0"], ["--dry-run"]], ids=lambda how: how[0]
)
def test_a_file_that_is_not_smaller_is_said_to_be_so(here, modelopt, how):
    torch.save({"large": torch.zeros(200_000), "small.weight": torch.ones(4, 4)}, "n.pth")
    outcome = modelopt(*METHODS["quantize"], "-o", "o.safetensors", *how)
    (line,) = (line for line in (outcome.err + outcome.out).splitlines() if line.startswith(SAME))
    assert outcome.code == 0
    assert f"before {(here / 'n.pth').stat().st_size:,} bytes with 800,064 bytes of tensors" in line
    if how == ["--latency-runs", "0"]:
        assert "not smaller" in outcome.out or "larger" in outcome.out


def test_coverage_of_tensors_is_read_back_and_judged(here, modelopt):
    write_layers("n.pth", 3)
    judged = [
        "--include",
        "0",
        "--latency-runs",
        "0",
        "--min-coverage",
        "0.3",
        "--json",
        "-o",
        "o.safetensors",
    ]
    outcome = modelopt(*METHODS["quantize"], *judged)
    assert outcome.code == 0, outcome.err
    model = json.loads(outcome.out)["evaluation"]["models"][1]
    assert model["coverage"] == model["weight_coverage"] == pytest.approx(1 / 3)
    assert (
        modelopt("eval", "n.pth", "o.safetensors", "--latency-runs", "0", "--min-coverage", "0.34").code == 1
    )


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "."], ids=["index", "folder"])
def test_the_size_of_several_files_is_that_of_what_was_read(here, modelopt, name):
    folder = here / "sharded"
    folder.mkdir()
    values = torch.randn(2, 100, 100, generator=torch.Generator().manual_seed(0))
    shards = {f"model-{i}.safetensors": {f"{i}.weight": values[i].clone()} for i in range(2)}
    for shard, state in shards.items():
        save_file(state, folder / shard)
    table = {tensor: shard for shard, state in shards.items() for tensor in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    read = sum(path.stat().st_size for path in folder.iterdir())
    torch.save({"0.weight": values[0]}, folder / "pytorch_model.bin")  # the same again, not read
    outcome = modelopt("quantize", folder / name, *BARE, "--latency-runs", "0", "--json")
    assert outcome.code == 0, outcome.err
    evaluation = json.loads(outcome.out)["evaluation"]
    assert evaluation["models"][0]["file_bytes"] == read
    assert 3.5 < evaluation["comparisons"][0]["ratio"] < 4
    assert "not smaller" not in outcome.err


ODD = """
from torch import nn

def video():
    return nn.Sequential(
        nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5),
    )

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.GRU(16, 16, batch_first=True) for _ in range(8))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for layer in self.body:
            x, _ = layer(x)
        return self.head(x[:, -1])
"""
CONV, GRU, HEAD = 27 * 16 * (3 + 16), 8 * 2 * 3 * 16 * 16, 16 * 5
DYNAMIC = "dynamic int8 serves Linear and Embedding, not Conv3d"
SLOWER = "16 hidden units, fewer than 768: its steps would take longer in int8"


OTHER = {"video": ("3x4x8x8", "Conv3d", 2, CONV), "Recurrent": ("6x16", "GRU", 8, GRU)}
CASES = [*product(OTHER, ("int8", "int8-dynamic", "int8-weight"))]


@pytest.mark.parametrize(("name", "scheme"), quick(CASES, set(CASES) - {("Recurrent", "int8-dynamic")}))
def test_a_network_of_other_layers_is_said_to_be_left(name, scheme, enter, tmp_path, modelopt):
    shape, kind, count, left = OTHER[name]
    (tmp_path / "odd").mkdir()
    here = enter(tmp_path / "odd")
    (here / "odd.py").write_text(ODD)
    scope = {}
    exec(compile(ODD, "odd.py", "exec"), scope)  # noqa: S102 -- our own text
    torch.save(scope[name]().state_dict(), "odd.pth")
    words = ["quantize", "odd.pth", "--arch", f"odd.py:{name}", "--input-shape", shape, "--scheme", scheme]
    words += ["--calibration", f"synthetic:{shape}"] * (scheme == "int8")
    found = modelopt(*words, "--no-eval", "-o", "out.safetensors")
    assert found.code == 0, found.err
    lines = found.err.splitlines()
    if scheme == "int8-weight" or (name, scheme) == ("video", "int8"):
        assert f"compressed {count + 1} of {count + 1} layers, 100.0 % of the weights' bytes" in lines
        assert "warning" not in found.err
        return
    share = 100 * HEAD / (left + HEAD)
    assert f"compressed 1 of {count + 1} layers, {share:.1f} % of the weights' bytes" in lines
    why = SLOWER if kind == "GRU" else DYNAMIC
    assert f"  not {count} layers, {100 - share:.1f} %: {why}" in lines
    few = f"warning: only {share:.1f} % of the weights' bytes are compressed"
    assert f"{few}; --scheme int8-weight or fp16 or bf16 serves layers of any kind" in lines
    smaller = (here / "out.safetensors").stat().st_size < (here / "odd.pth").stat().st_size
    assert any(line.startswith(SAME) for line in lines) or smaller
    judged = modelopt(*words, "--min-coverage", "0.5", "--runs", "0", "--force", "-o", "out.safetensors")
    assert (judged.code, "min-coverage" in judged.err) == (1, True)


PRUNE = {
    "channels": ["prune", "--sparsity", "0.5", "--allocation", "uniform", "--round-to", "1"],
    "unstructured": ["prune", "--sparsity", "0.5", "--structure", "unstructured", "--allocation", "uniform"],
}
SHARE = ["share", "--bits", "4"]
SECOND = {
    "static": ["quantize", "--calibration", "digits"],
    "weight": ["quantize", "--scheme", "int8-weight"],
    "share": SHARE,
}
MORE = ["prune", "--sparsity", "0.8", "--structure", "unstructured", "--allocation", "uniform"]
CHAINS = {f"{first}, {second}": (PRUNE[first], SECOND[second]) for first in PRUNE for second in SECOND}
CHAINS |= {"share, static": (SHARE, SECOND["static"]), "unstructured twice": (PRUNE["unstructured"], MORE)}
TENSORS = ("unstructured, weight", "unstructured, share", "unstructured twice")  # what needs no graph


@pytest.mark.parametrize(
    ("chain", "graph"), [*((name, True) for name in CHAINS), *((name, False) for name in TENSORS)]
)
def test_a_method_counts_only_what_it_did_itself(chain, graph, here, modelopt):
    """All three layers are compressed before; the second method leaves out the first."""
    first, second = CHAINS[chain]
    name = ["--arch", "net.py:make", "--input-shape", "1x8x8"] if graph else []
    assert modelopt(first[0], "net.pth", *first[1:], *name, "--no-eval", "-o", "a.safetensors").code == 0
    words = [second[0], "a.safetensors", *second[1:], "--exclude", "0", "--no-eval", "--force"]
    found = modelopt(*words, "-o", "b.safetensors", "-v")
    assert found.code == 0, found.err
    assert "compressed 2 of 3 layers" in found.err
    assert "  compressed before this: 3 of 3 layers\n" in found.err
    (said,) = re.findall(r"\n  not 1 layer, (.*) %: matched by --exclude\n", found.err)
    first_layer, *others = (torch.Size(shape).numel() for shape in ((4, 1, 3, 3), (8, 4, 3, 3), (10, 128)))
    assert float(said) == pytest.approx(100 * first_layer / sum((first_layer, *others)), abs=0.1)
    data = json.loads(modelopt(*words, "-o", "b.safetensors", "--json").out)
    assert (data["compressed"]["layers"], data["compressed"]["layers_before"]) == (2, 3)
    (entry,) = json.loads(modelopt("inspect", "b.safetensors", "--json").out)["history"][1:]
    assert entry["coverage"] == {"compressed": 2, "total": 3}
    if graph:  # the file as it is, with what both did
        table = modelopt("eval", "b.safetensors", "--latency-runs", "0", "--json")
        assert json.loads(table.out)["models"][0]["coverage"] == 1
