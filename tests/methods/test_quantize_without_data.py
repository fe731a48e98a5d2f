"""Calibration without data: samples learned from batch norms, and biases corrected by them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_networks import captured, images, sqnr
from torch import Tensor, nn
from torch.distributions import Normal as Bell
from torch.distributions import kl_divergence

from modelopt_cli import api, artifact
from modelopt_cli.data import open_data
from modelopt_cli.data.norm_samples import ForNetwork, divergence_of
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.quantize.equalizing.channel_normals import channel_normals, recorded_normals
from modelopt_cli.program import InputSpec, Preprocess, Program
from modelopt_cli.program.capture import capture

pytestmark = pytest.mark.usefixtures("one_thread")


def separable(**norms: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, **norms),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8, **norms),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def pictures(n: int, seed: int = 0) -> Tensor:
    return (images(n, 3, 16, 16, seed=seed).sigmoid() - 0.5) / 0.25


@pytest.fixture(scope="module")
def program() -> Program:
    """A network whose batch norms have seen pictures, with channels of different sizes."""
    torch.manual_seed(0)
    net = separable()
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.3, 2)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
        norm.momentum = None  # type: ignore[assignment]
    with torch.no_grad():
        net.train()(pictures(256, seed=1))
    made = captured(net, 3, 16, 16)
    made.input = InputSpec((3, 16, 16), Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3))
    return made


@pytest.fixture(scope="module")
def source(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("norms") / "net.safetensors"
    artifact.write_program(program, path)
    return path


def test_divergence_is_that_of_two_normal_distributions() -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3, eps=1e-9), torch.randn(16, 3, 5, 5) * 3 + 1
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.1
    seen = x.movedim(1, 0).flatten(1)
    batch = Bell(seen.mean(1), seen.std(1, correction=0))
    expected = kl_divergence(batch, Bell(norm.running_mean, norm.running_var.sqrt())).mean()
    torch.testing.assert_close(divergence_of(norm, x), expected)


def test_learned_samples_give_the_statistics_of_the_norms(program: Program) -> None:
    data = open_data("none", input_spec=program.input, network=ForNetwork(program))
    samples = next(data.batches(32))[0]
    assert isinstance(samples, Tensor)
    learned, patches = samples.chunk(2)
    noise = torch.randn(learned.shape, generator=torch.Generator().manual_seed(0))

    def divergences(x: Tensor) -> float:
        net = nn.Sequential(*(program.get_submodule(str(i)) for i in range(9)))
        return sum(float(divergence_of(net[i], net[:i](x))) for i in (1, 4))

    with torch.no_grad():
        assert divergences(learned) < 0.05 * divergences(noise)
    # A quarter of 16 pixels comes again and again.
    assert torch.equal(patches[..., :12, :], patches[..., 4:, :])
    assert torch.equal(patches[..., :12], patches[..., 4:])
    pixels = learned * 0.25 + 0.5
    assert 0 <= pixels.min() < 0.2
    assert 0.8 < pixels.max() <= 1
    assert len(next(open_data("none?n=3", network=ForNetwork(program)).batches(9))[0]) == 3
    assert len(next(open_data("none", network=ForNetwork(program, most=2)).batches(9))[0]) == 2


def test_pictures_that_were_never_seen(program: Program) -> None:
    x = pictures(128)
    int8 = api.quantize(program, calibration="none?n=16").program
    with torch.no_grad():
        assert sqnr(program(x), prepare(int8)(x)) > 20


def test_the_file_and_the_result_say_so_and_depend_on_the_seed_alone(source: Path, tmp_path: Path) -> None:
    files = []
    for place, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{place}.safetensors"
        result = api.quantize(source, path, calibration="none?n=2", evaluate=False, seed=seed)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]
    assert any("calibrated without data, on 2 samples learned from 2 batch norms" in n for n in result.notes)
    assert api.load(path).history[-1]["calibration"] == "no data: 2 samples learned from 2 batch norms"


@pytest.mark.parametrize(
    ("net", "shape", "problem"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (4,), "no batch norm .* int8-dynamic or int8-weight"),
        (separable(track_running_stats=False), (3, 16, 16), "no batch norm"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), "7:int64", "is int64, and only floats"),
    ],
    ids=["no norm", "no statistics", "token ids"],
)
def test_refused_in_one_line(net: nn.Module, shape: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"{problem}"):
        api.quantize(net, calibration="none", input_shape=shape)


def test_there_are_no_such_samples_to_judge_by_nor_labels_to_choose_by(source: Path) -> None:
    with pytest.raises(DataError, match="to calibrate on, and nothing else"):
        api.quantize(source, data="none")
    with pytest.raises(UsageError, match="max_drop is measured on samples"):
        api.quantize(source, calibration="none", precision="auto", max_drop=1.0)


def test_a_preprocessing_that_cannot_be_right_is_refused(source: Path) -> None:
    with pytest.raises(DataError, match=r"no inputs .* give what its batch norms recorded"):
        api.quantize(source, calibration="none?n=2", mean=(0.5,) * 3, std=(5.0,) * 3)


def test_moments_are_those_of_random_numbers() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.mixing, self.head = nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            clipped = nn.functional.relu6(self.first(x))
            gate = torch.sigmoid(self.second(y))
            total, product = clipped + gate, clipped * gate
            return clipped, total, product, self.mixing(clipped), torch.cat([total, product], 1)

    net = Net()
    for norm in (net.first, net.second):
        nn.init.uniform_(norm.weight, 0.5, 3)
        nn.init.normal_(norm.bias, 2.0, 2.0)
    sample = InputSpec((4,), name="x", others=(InputSpec((4,), name="y"),))
    program = capture(net.eval(), sample, verify=False)
    normals = channel_normals(program, recorded_normals(program, program, program))
    # Norms that recorded mean 0 and variance 1 make of normal numbers what they say.
    x, y = torch.randn(2, 400_000, 4)
    with torch.no_grad():
        outputs = program(x, y)
    nodes = next(iter(program.graph.find_nodes(op="output"))).args[0]
    assert len(nodes) == 5
    for node, values in zip(nodes, outputs, strict=True):
        torch.testing.assert_close(normals[node].mean.float(), values.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(normals[node].std.float(), values.std(0), rtol=0.02, atol=0.01)


def test_a_layer_loses_the_error_of_its_weight_times_the_mean_of_a_clipped_normal(program: Program) -> None:
    made = {
        rule: api.quantize(program, calibration=pictures(16), equalize="none", bias_correction=rule).program
        for rule in ("none", "analytic")
    }
    norm: Any = program.get_submodule("1")
    bell = Bell(norm.bias.detach().double(), norm.weight.detach().double())
    standard, (low, high) = Bell(0.0, 1.0), ((limit - bell.loc) / bell.scale for limit in (0.0, 6.0))

    def density(x: Tensor) -> Tensor:
        return standard.log_prob(x).exp()

    # E[min(max(X, 0), 6)], Nagel et al., appendix C.
    inside = standard.cdf(high) - standard.cdf(low)
    mean = bell.loc * inside + bell.scale * (density(low) - density(high)) + 6 * (1 - standard.cdf(high))
    plain, corrected = (made[rule].get_submodule("3") for rule in made)
    depthwise, second = program.get_submodule("3"), program.get_submodule("4")
    scale = second.weight / (second.running_var + second.eps).sqrt()  # type: ignore[operator,union-attr]
    folded = depthwise.weight * scale.view(-1, 1, 1, 1)  # type: ignore[operator,union-attr]
    error = (corrected.float_weight() - folded).detach().double().sum((1, 2, 3))  # type: ignore[operator]
    expected = plain.bias - (error * mean).float()  # type: ignore[operator]
    torch.testing.assert_close(corrected.bias, expected, rtol=1e-3, atol=2e-6)
    assert not torch.equal(corrected.bias, plain.bias)  # type: ignore[arg-type]


def test_without_norms_no_mean_is_known() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="no batch norm tells"):
        api.quantize(net, calibration=torch.randn(8, 4), bias_correction="analytic")
