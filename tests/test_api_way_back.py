"""From a file that was made without a graph back to ordinary weights, to a module, and to a Program."""

import math
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelopt_cli
from modelopt_cli import api, artifact
from modelopt_cli.checkpoint import open_model, read_state, resolve
from modelopt_cli.errors import ArchitectureError, ArtifactError, CaptureError, CheckpointError, UsageError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

NET = """
    import torch
    from torch import nn

    class Text(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.embed, self.body = nn.Embedding(50, 16), nn.Linear(16, 16)
            self.lm_head = nn.Linear(16, 50, bias=False)
            if tied:
                self.lm_head.weight = self.embed.weight

        def forward(self, x):
            return self.lm_head(torch.relu(self.body(self.embed(x))))

    def image():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x) + 0 * sum(p.sum() for p in self.parameters())

    def branching():
        return Branching(*image())
"""
IMAGE = InputSpec((3, 8, 8))
SAMPLES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WEIGHT_ONLY = {
    "quantize": lambda source, out, **how: api.quantize(
        source, out, config=QuantizeConfig(scheme="int8-weight"), evaluate=False, **how
    ),
    "share": lambda source, out, **how: api.share(
        source, out, config=ShareConfig(bits=5), evaluate=False, **how
    ),
    "prune": lambda source, out, **how: api.prune(
        source, out, config=PruneConfig(structure="unstructured", sparsity=0.5), evaluate=False, **how
    ),
}


@pytest.fixture
def nets(tmp_path):
    """The names of the networks of ``NET``, as specs."""
    (tmp_path / "own_nets.py").write_text(textwrap.dedent(NET))
    return lambda name: f"{tmp_path / 'own_nets.py'}:{name}"


def make(nets, name, **options):
    more = "&".join(f"{key}={value}" for key, value in options.items())
    torch.manual_seed(3)
    return resolve(nets(name) + (f"?{more}" if more else "")).build().eval()


@pytest.mark.parametrize("verb", WEIGHT_ONLY)
@pytest.mark.parametrize("name", ["Text", "image"])
def test_weights_come_back_as_an_ordinary_state_dict(verb, name, nets, tmp_path):
    network, out = make(nets, name), tmp_path / "out.safetensors"
    torch.save(network.state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY[verb](tmp_path / "a.pth", out)
    state = modelopt_cli.load_state_dict(out)
    assert state.keys() == network.state_dict().keys()
    made = artifact.read_tensors(out).state
    assert all(torch.equal(state[name], made[name]) for name in made)
    fresh = make(nets, name)
    fresh.load_state_dict(state)  # strict: every name is there
    close = {"quantize": 0.02, "share": 0.2, "prune": 1.0}[verb]
    for key, value in network.state_dict().items():
        assert state[key].dtype == value.dtype
        assert (state[key] - value).norm() <= close * value.norm()
    if name == "Text":
        assert state["lm_head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_of_a_checkpoint_it_gives_what_reading_it_gives(nets, tmp_path):
    network = make(nets, "image")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "a.pth"
    )
    state = modelopt_cli.load_state_dict(tmp_path / "a.pth")
    assert list(state) == list(network.state_dict())
    assert all(
        torch.equal(state[name], value) for name, value in read_state(tmp_path / "a.pth").state.items()
    )


def test_of_a_program_it_gives_its_tensors_but_not_those_of_int8_layers(nets, tmp_path):
    network, out = make(nets, "image"), tmp_path / "out.safetensors"
    torch.save(network.state_dict(), tmp_path / "a.pth")
    data = {"calibration": "synthetic:3x8x8?n=8", "evaluate": False}
    api.prune(tmp_path / "a.pth", out, config=PruneConfig(sparsity=0.5), arch=nets("image"), **data)
    state = modelopt_cli.load_state_dict(out)
    assert state["0.weight"].shape[0] < 8
    api.quantize(out, tmp_path / "int8.safetensors", **data)
    with pytest.raises(ArtifactError, match=r"compute in int8 and have no float weights; load\(path\)"):
        modelopt_cli.load_state_dict(tmp_path / "int8.safetensors")


@pytest.mark.parametrize("verb", WEIGHT_ONLY)
def test_with_its_architecture_such_a_file_is_a_program_that_keeps_all(verb, nets, tmp_path):
    network, out = make(nets, "image"), tmp_path / "out.safetensors"
    torch.save(network.state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY[verb](tmp_path / "a.pth", out)
    program = modelopt_cli.load(out, arch=nets("image"), input_spec=IMAGE)
    assert isinstance(program, Program)
    network.load_state_dict(modelopt_cli.load_state_dict(out))
    with torch.no_grad():
        assert torch.allclose(program(SAMPLES), network(SAMPLES), atol=1e-5)
    assert [entry["method"] for entry in program.history] == [verb]
    assert program.encodings.keys() == artifact.read_tensors(out).encodings.keys()


def test_a_program_made_of_it_is_compressed_further_and_keeps_its_promises(nets, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    torch.save(make(nets, "image").state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY["prune"](tmp_path / "a.pth", first)
    data = {"calibration": "synthetic:3x8x8?n=8", "evaluate": False}
    api.quantize(first, second, arch=nets("image"), **data)
    program = artifact.read_program(second)
    assert [entry["method"] for entry in program.history] == ["prune", "quantize"]
    before = modelopt_cli.load_state_dict(first)
    (zeros,) = {(before[name] == 0).sum().item() for name in ["0.weight"]}
    int8 = next(t for t in program.state_dict().values() if t.dtype == torch.int8 and t.dim() == 4)
    assert (int8 == 0).sum() >= zeros > 0


def test_what_load_says_where_there_is_no_graph_is_true(nets, tmp_path):
    out = tmp_path / "out.safetensors"
    torch.save(make(nets, "image").state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY["quantize"](tmp_path / "a.pth", out)
    with pytest.raises(ArchitectureError, match=r"without their network; .*load_state_dict\(path\)"):
        modelopt_cli.load(out)
    with pytest.raises(CaptureError, match=r"does not say what its input is; .*load_network") as caught:
        modelopt_cli.load(out, arch=nets("image"))
    assert "traced" not in str(caught.value)
    with pytest.raises(CaptureError, match=r"cannot be traced: .*values in a tensor"):
        modelopt_cli.load(out, arch=nets("branching"), input_spec=IMAGE)
    assert isinstance(modelopt_cli.load_network(out, arch=nets("branching")), nn.Module)


def test_weights_that_a_safetensors_file_has_once_fill_all_their_names(nets, tmp_path):
    network, out = make(nets, "Text"), tmp_path / "out.safetensors"
    kept = {name: value for name, value in network.state_dict().items() if name != "lm_head.weight"}
    save_file(kept, tmp_path / "a.safetensors")
    WEIGHT_ONLY["quantize"](tmp_path / "a.safetensors", out, arch=nets("Text"))
    assert artifact.read_header(out)["tied"] == {"lm_head.weight": "embed.weight"}
    again = modelopt_cli.load_network(out, arch=nets("Text"))
    assert again.lm_head.weight is again.embed.weight
    WEIGHT_ONLY["quantize"](tmp_path / "a.safetensors", tmp_path / "bare.safetensors")  # nobody knows of it
    again = modelopt_cli.load_network(tmp_path / "bare.safetensors", arch=nets("Text"))
    assert torch.equal(again.lm_head.weight, modelopt_cli.load_state_dict(out)["embed.weight"])


def test_weights_that_are_one_in_the_network_and_two_in_the_file_are_refused(nets, tmp_path):
    torch.save(make(nets, "Text", tied="false").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ArchitectureError, match=r"'embed.weight' and 'lm_head.weight' differ in the file"):
        modelopt_cli.load_network(tmp_path / "a.pth", arch=nets("Text"))


@pytest.mark.parametrize("verb", WEIGHT_ONLY)
def test_no_shape_is_asked_for_where_none_is_used(verb, nets, tmp_path):
    notes, out = [], tmp_path / "out.safetensors"
    torch.save(make(nets, "Text").state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY[verb](tmp_path / "a.pth", out, arch=nets("Text"), on_note=notes.append)
    assert any(note.startswith("works without a graph: ") and "input_shape" in note for note in notes)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda source, out, **how: api.quantize(source, out, **how), "scheme int8 needs"),
        (
            lambda source, out, **how: api.prune(source, out, config=PruneConfig(sparsity=0.5), **how),
            "structure channels needs",
        ),
        (
            lambda source, out, **how: api.share(
                source, out, config=ShareConfig(bits="auto", ratio=8), **how
            ),
            "bits='auto' needs",
        ),
    ],
    ids=["quantize", "prune", "share"],
)
def test_where_a_graph_is_needed_the_error_says_why_there_is_none_and_nothing_else(
    call, what, nets, tmp_path
):
    torch.save(make(nets, "image").state_dict(), tmp_path / "a.pth")
    for name, input, why in (("image", None, "input_shape"), ("branching", IMAGE, "cannot be traced: ")):
        notes = []
        data = "synthetic:3x8x8?n=4" if input else None
        with pytest.raises(UsageError, match=what) as caught:
            call(
                tmp_path / "a.pth",
                tmp_path / "out.safetensors",
                arch=nets(name),
                calibration=data,
                evaluate=False,
                on_note=notes.append,
            )
        assert why in str(caught.value)
        assert not any("works without a graph" in note for note in notes)


@pytest.mark.parametrize(
    ("values", "what"),
    [([1e300, 1.0], "1e+300"), ([1e-300, -3e-300], "3e-300"), ([0.0, 3.5e38], "3.5e+38")],
    ids=["beyond", "below", "just beyond"],
)
def test_float64_weights_that_float32_cannot_hold_are_refused(values, what, nets, tmp_path):
    state = make(nets, "image").double().state_dict()
    state["0.weight"].view(-1)[:] = 0
    state["0.weight"].view(-1)[:2] = torch.tensor(values, dtype=torch.float64)
    torch.save(state, tmp_path / "a.pth")
    for how in ({}, {"arch": nets("image"), "input_spec": IMAGE}):
        with pytest.raises(CheckpointError, match="which float32 cannot hold") as caught:
            open_model(tmp_path / "a.pth", **how)
        assert f"values up to {what}" in str(caught.value)


def test_float64_weights_of_ordinary_size_are_converted(nets, tmp_path):
    network, out = make(nets, "image").double(), tmp_path / "out.safetensors"
    network[0].weight.data.view(-1)[0] = 1e-300  # one of many may vanish
    torch.save(network.state_dict(), tmp_path / "a.pth")
    program = modelopt_cli.load(tmp_path / "a.pth", arch=nets("image"), input_spec=IMAGE)
    assert torch.equal(program.state_dict()["4.weight"], network[4].weight.float())
    WEIGHT_ONLY["quantize"](tmp_path / "a.pth", out)
    found = modelopt_cli.load_state_dict(out)["4.weight"]
    assert found.dtype == torch.float64
    assert (found - network[4].weight).abs().max() <= network[4].weight.abs().max() / 250


def test_a_mask_of_zero_and_minus_infinity_is_no_divergence(tmp_path):
    mask = torch.triu(torch.full((4, 4), -torch.inf), 1)
    torch.save({"a.weight": torch.randn(8, 8), "attn_mask": mask}, tmp_path / "a.pth")
    out = tmp_path / "out.safetensors"
    WEIGHT_ONLY["quantize"](tmp_path / "a.pth", out)
    assert torch.equal(modelopt_cli.load_state_dict(out)["attn_mask"], mask)
    torch.save({"a.weight": torch.tensor([[1.0, -torch.inf]])}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        WEIGHT_ONLY["quantize"](tmp_path / "b.pth", tmp_path / "b.safetensors")


def test_an_expanded_tensor_is_refused_with_a_way_that_works(tmp_path):
    tensor = torch.ones(1).expand(64)
    torch.save({"w": tensor, "b": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"save its \.clone\(\)"):
        read_state(tmp_path / "a.pth")
    torch.save({"w": tensor.clone()}, tmp_path / "a.pth")
    assert torch.equal(read_state(tmp_path / "a.pth").state["w"], torch.ones(64))


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(-120, torch.float32), (120, torch.float32), (100, torch.float64), (-100, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_are_compared_whatever_their_size(criterion, power, dtype, tmp_path):
    weight = (torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(8, 8) + 1).to(dtype)
    torch.save(
        {"a.weight": weight * 2.0**power, "b.weight": torch.ones(2, 2, dtype=dtype)}, tmp_path / "a.pth"
    )
    config = PruneConfig(structure="unstructured", criterion=criterion, sparsity=0.5, allocation="uniform")
    out = tmp_path / "out.safetensors"
    api.prune(tmp_path / "a.pth", out, config=config, evaluate=False)
    found = modelopt_cli.load_state_dict(out)["a.weight"]
    assert torch.equal(found != 0, weight > 32)


@pytest.mark.parametrize("size", [1e-36, 1e-44])
def test_int8_refuses_to_round_all_of_a_weight_to_zero(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.full((4, 4), size), "b.weight": torch.ones(4, 4)}, "a.pth")
    with pytest.raises(UsageError, match="cannot hold; leave it out with exclude='a'"):
        WEIGHT_ONLY["quantize"]("a.pth", "out.safetensors")
    config = QuantizeConfig(scheme="int8-weight", exclude=("a",))  # as the hint says
    api.quantize("a.pth", "out.safetensors", config=config, evaluate=False)
    assert torch.equal(modelopt_cli.load_state_dict("out.safetensors")["a.weight"], torch.full((4, 4), size))


@pytest.mark.slow
def test_the_line_for_the_shell_that_the_docs_give_works(nets, tmp_path):
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    (line,) = (
        text.strip() for text in page.read_text().splitlines() if "m.load_state_dict(sys.argv[1])" in text
    )
    torch.save(make(nets, "Text").state_dict(), tmp_path / "a.pth")
    WEIGHT_ONLY["quantize"](tmp_path / "a.pth", tmp_path / "small.safetensors")
    command = [sys.executable, *shlex.split(line)[1:]]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, cwd=tmp_path, env=environ)
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    want = modelopt_cli.load_state_dict(tmp_path / "small.safetensors")
    assert list(state) == list(want)
    assert all(torch.equal(state[name], value) for name, value in want.items())


def test_names_that_a_program_has_itself_come_back_as_the_network_s(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.meta = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.meta(self.input(x).mean((2, 3)))

    network, path = Net().eval(), tmp_path / "net.safetensors"
    modelopt_cli.save(capture(network, IMAGE), path)
    assert "input__.weight" in modelopt_cli.load(path).state_dict()
    again = Net().eval()
    again.load_state_dict(modelopt_cli.load_state_dict(path))
    with torch.no_grad():
        assert torch.equal(again(SAMPLES), network(SAMPLES))


def tiny_network(values: float = 1.0, weights: float = 1.0):
    """A network of such small weights in its middle, and samples of such small values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        net[2].weight.mul_(weights)
        for layer in net[::2]:
            layer.bias.zero_()
    return net, torch.randn(64, 8) * values


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize(
    "sizes", [{"values": 1e-14}, {"values": 1e-34}, {"weights": 1e-20}, {"weights": 1e-33}]
)
def test_tiny_values_are_rounded_and_not_lost(sizes, scheme):
    net, x = tiny_network(**sizes)
    with torch.no_grad():
        wanted = net(x).double()
    made = modelopt_cli.quantize(net, calibration=[x], scheme=scheme)
    noise = (made.program(x).double() - wanted).square().sum()
    assert 10 * math.log10(float(wanted.square().sum() / noise)) > 30


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weight"])
def test_weights_that_no_scale_holds_are_named(scheme):
    net, x = tiny_network(weights=1e-37)
    with pytest.raises(UsageError, match=r"2\.weight: has values up to .*; leave it out with exclude='2'"):
        modelopt_cli.quantize(net, calibration=[x], scheme=scheme)


def test_the_warning_on_a_low_signal_to_noise_is_among_the_notes():
    net, x = tiny_network()
    lines = []
    few = {"weight_bits": 2, "act_bits": 2, "edge_bits": 2}
    made = modelopt_cli.quantize(net, calibration=[x], on_note=lines.append, **few)
    (line,) = (each for each in lines if "the outputs keep" in each)
    assert line in made.notes
    assert line.startswith(f"warning: the outputs keep {made.snr_db:.1f} dB of signal to noise")
