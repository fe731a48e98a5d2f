"""Sensitivities against the int8 network of one layer, networks broken on purpose, and the words for them."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from broken_networks import chain, with_dead_layer, with_outlier_channel, with_tiny_variance
from quantize_networks import Images, captured, context, images, small, sqnr
from rich.console import Console
from torch import Tensor, nn

from modelopt_cli import report
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import convert
from modelopt_cli.methods.quantize.precision_plan import make_plan
from modelopt_cli.methods.quantize.sensitivity import rounding_sensitivity
from modelopt_cli.methods.quantize.sensitivity.rounding_sensitivity import (
    LayerSensitivity,
    QuantizeSensitivity,
    sensitivity,
)
from modelopt_cli.methods.quantize.sensitivity.sensitivity_words import sentences
from modelopt_cli.methods.quantize.static import calibrated, integer_network
from modelopt_cli.methods.quantize.widths import INT8, Widths
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.report.plots import HeatMap, draw
from modelopt_cli.report.rounded import sensitivity_picture


def found_in(network: nn.Module, equalize: str = "none") -> QuantizeSensitivity:
    program = captured(network, 3, 12, 12)
    config = QuantizeConfig(observer="minmax", equalize=equalize, bias_correction="none")
    return sensitivity(program, config, context(program, 16))


def by_name(found: QuantizeSensitivity) -> dict[str, LayerSensitivity]:
    return {layer.name: layer for layer in found.layers}


@pytest.mark.parametrize(("correction", "bits"), [("none", 8), ("measured", 8), ("measured", 4)])
def test_sensitivity_is_that_of_the_network_with_one_layer_alone_in_integers(
    correction: str, bits: int
) -> None:
    program, config = small(), QuantizeConfig(bias_correction=correction, act_bits=bits)
    found = by_name(sensitivity(program, config, context(program)))
    inner = "int8" if bits == 8 else f"W8A{bits}"
    names = {name: layer.int8.precision for name, layer in found.items()}
    assert names == {"stem": "int8", "body": inner, "dw": inner, "fc": "int8"}
    ready = calibrated(program, config, context(program))
    x = images(8, 3, 12, 12, seed=1)
    for name, layer in found.items():
        widths = INT8 if layer.int8.precision == "int8" else Widths(8, bits)
        one = replace(ready, selected=(name,), plan=make_plan(ready.program, {name: widths}))
        alone = integer_network(one, config, context(program))
        with torch.no_grad():
            expected, outputs = program(x), alone(x)
        assert layer.int8.snr_db == pytest.approx(sqnr(expected, outputs), abs=0.01)
        p, q = F.log_softmax(expected.double(), 1), F.log_softmax(outputs.double(), 1)
        assert layer.int8.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-2)


def test_bytes_are_those_of_the_tensors_that_a_file_holds() -> None:
    program = small()
    found = by_name(sensitivity(program, QuantizeConfig(), context(program)))
    assert [loss.bytes for loss in found["stem"].losses] == [4 * (8 * 27 + 8), 8 * 27 + 8 * 4 + 8 * 4]
    assert [loss.bytes for loss in found["fc"].losses] == [4 * (40 + 5), 40 + 5 * 4 + 5 * 4]


def test_both_times_of_a_layer_are_measured(one_thread: None) -> None:
    program = small()
    for layer in sensitivity(program, QuantizeConfig(), context(program)).layers:
        assert all(loss.milliseconds is not None and 0 < loss.milliseconds < 100 for loss in layer.losses)


def test_a_layer_that_is_called_twice_is_rounded_in_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    program = captured(Twice(), 3, 12, 12)
    found = by_name(sensitivity(program, QuantizeConfig(), context(program)))
    ready = calibrated(program, QuantizeConfig(), context(program))
    alone = convert(ready.program, make_plan(ready.program, {"conv": INT8}), ready.qparams)
    x = images(8, 3, 12, 12, seed=1)
    with torch.no_grad():
        # There the first call's output is rounded for the second, which reads it: the same rounding.
        assert found["conv"].losses[1].snr_db == pytest.approx(sqnr(program(x), alone(x)), abs=0.5)


def test_nothing_changes_and_twice_gives_the_same() -> None:
    program = small()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    found = [sensitivity(program, QuantizeConfig(), context(program)) for _ in range(2)]
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())
    losses = [[(layer.losses[1].snr_db, layer.reason) for layer in each.layers] for each in found]
    assert losses[0] == losses[1]


def test_a_healthy_network_is_not_broken_by_any_layer() -> None:
    found = found_in(chain())
    assert not found.breaking
    assert not found.dead
    (line,) = sentences(found)
    assert line.startswith("no layer alone takes the outputs below 20 dB; most is lost by ")
    assert line.endswith("Above 30 dB there is nothing to explain")
    assert all(layer.int8.snr_db > 30 and layer.reason is None for layer in found.layers)


@pytest.mark.parametrize(("bits", "limit"), [(8, 20), (4, 10)])
def test_a_layer_breaks_the_network_at_the_limit_of_the_warning(bits: int, limit: float) -> None:
    program, config = small(), QuantizeConfig(act_bits=bits)
    signal = METHODS["quantize"].signal(config)
    assert signal is not None
    assert sensitivity(program, config, context(program), timed=False).least_db == signal.least_db == limit


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons of layers that lose next to nothing, too."""
    monkeypatch.setattr(rounding_sensitivity, "HARMLESS_DB", 200.0)


def test_steps_of_four_bits_are_counted_out_of_sixteen(explained: None) -> None:
    network = chain()
    program = captured(network, 3, 12, 12)
    config = QuantizeConfig(observer="minmax", equalize="none", bias_correction="none", act_bits=4)
    layer = by_name(sensitivity(program, config, context(program, 16), timed=False))["second"]
    assert layer.reason is not None
    counted = re.search(r"99 % of the values of its input .* lie on (\d+) of (\d+) steps", layer.reason.text)
    assert counted is not None
    with torch.no_grad():
        x = network.norm1(network.first(images(16, 3, 12, 12, seed=1))).relu()
    counts = torch.histc((x / x.max() * 15).round(), 16, -0.5, 15.5).sort(descending=True).values
    used = next(n for n in range(1, 17) if counts[:n].sum() >= 0.99 * x.numel())
    assert (int(counted[1]), int(counted[2])) == (used, 16)
    assert layer.reason.kind == "few levels"


@pytest.mark.parametrize(("name", "bounded"), [("second", True), ("third", False)])
def test_steps_of_weights_are_those_that_the_bound_of_pairs_leaves(
    name: str, bounded: bool, explained: None
) -> None:
    network = chain()
    with torch.no_grad():
        network.third.weight.pow_(3)  # a few are large, which int8 serves worse than the inputs
    reason = by_name(found_in(network))[name].reason
    program = captured(network, 3, 12, 12)
    config = QuantizeConfig(observer="minmax", equalize="none", bias_correction="none")
    weight = apply(program, config, context(program, 16)).program.get_submodule(name).weight.int().abs()
    middle = weight.flatten(1).double().quantile(0.9, dim=1).median()
    assert reason is not None
    assert f"lie within {middle:.0f} of {weight.max()} steps from zero" in reason.text
    assert ("all that the bound of pairs leaves of 127" in reason.text) == bool(weight.max() < 127) == bounded


def test_a_channel_times_a_thousand_is_the_outlier_channel_of_the_layer_that_reads_it() -> None:
    found = found_in(with_outlier_channel(5))
    assert [layer.name for layer in found.breaking] == ["second"]
    reason = by_name(found)["second"].reason
    assert reason is not None
    assert (reason.kind, reason.channel, reason.of_input) == ("outlier channel", 5, True)
    assert "channel 5 of its input (made by first) reaches" in reason.text
    assert sentences(found)[0].startswith("second breaks the network first: rounded to int8 alone it leaves ")


def test_a_batch_norm_of_tiny_variance_is_named_as_the_cause() -> None:
    found = found_in(with_tiny_variance(7))
    reason = by_name(found)["second"].reason
    assert found.breaking[0].name == "second"
    assert reason is not None
    assert (reason.kind, reason.channel) == ("outlier channel", 7)
    assert "the batch norm behind first multiplies it" in reason.text


def whole_db(network: nn.Module, equalize: str) -> float:
    """Signal to noise of the int8 network's outputs."""
    program, x = captured(network, 3, 12, 12), images(16, 3, 12, 12, seed=1)
    config = QuantizeConfig(observer="minmax", equalize=equalize, bias_correction="none")
    with torch.no_grad():
        return sqnr(program(x), apply(program, config, context(program, 16)).program(x))


@pytest.mark.parametrize(
    "broken", [with_outlier_channel(5), with_tiny_variance(7)], ids=["outlier", "variance"]
)
def test_what_dwarfs_other_channels_is_repaired_by_equalisation(broken: nn.Module) -> None:
    assert found_in(broken).breaking
    repaired = found_in(broken, "outputs")
    assert not repaired.breaking
    assert by_name(repaired)["second"].int8.snr_db > 30
    assert whole_db(broken, "none") < 20
    assert whole_db(broken, "outputs") > whole_db(chain(), "none") - 3


def test_a_dead_layer_stays_what_it_is_and_breaks_no_equalisation() -> None:
    network = with_dead_layer()
    before, after = found_in(network), found_in(network, "outputs")
    assert [layer.name for layer in after.dead] == [layer.name for layer in before.dead] == ["second"]
    assert whole_db(network, "outputs") > whole_db(network, "none") - 3


@pytest.mark.parametrize("how", ["weight of zeros", "activation that lets nothing through"])
def test_a_dead_layer_is_found(how: str) -> None:
    network = chain()
    with torch.no_grad():
        if how == "weight of zeros":
            network.second.weight.zero_()
        else:
            network.norm2.bias.fill_(-1e3)
    found = found_in(network)
    (dead,) = found.dead  # and none of the layers behind it
    assert dead.name == ("second" if how == "weight of zeros" else "third")
    assert sentences(found)[0].startswith(f"{dead.name} is dead: its ")


def test_few_values_that_stretch_a_range_are_the_reason() -> None:
    network = chain()
    program = captured(network, 3, 12, 12)
    given = context(program, 16)
    given.data.images[0, :, 0, 0] = 1e3  # type: ignore[union-attr]
    layer = by_name(sensitivity(program, QuantizeConfig(observer="minmax"), given))["first"]
    assert layer.reason is not None
    assert layer.reason.kind == "range"
    assert layer.reason.of_input


@pytest.mark.parametrize(("bits", "times"), [(8, 1e3), (4, 6)])
def test_values_that_are_cut_off_are_the_reason(bits: int, times: float) -> None:
    network = chain()
    program = captured(network, 3, 12, 12)
    given = context(program, 32)
    given.data.images[:8] /= times  # type: ignore[union-attr]
    config = QuantizeConfig(calibration_samples=8, act_bits=bits, edge_bits=bits)
    layer = by_name(sensitivity(program, config, given, timed=False))["first"]
    assert layer.reason is not None
    assert layer.reason.kind == "saturation"


def test_weights_of_one_input_channel_that_dwarf_the_others_are_the_reason() -> None:
    network = chain()
    with torch.no_grad():
        network.norm1.weight[2] /= 1000  # the channel is small, and its weights make up for it
        network.norm1.bias[2] /= 1000
        network.second.weight[:, 2] *= 1000
    reason = by_name(found_in(network))["second"].reason
    assert reason is not None
    assert reason.kind == "outlier channel"
    assert reason.channel == 2


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight"])
def test_a_scheme_without_fixed_scales_has_no_sensitivities(scheme: str) -> None:
    with pytest.raises(UsageError, match="no fixed scales"):
        sensitivity(small(), QuantizeConfig(scheme), context(small()))


def test_sensitivities_need_data_and_a_layer() -> None:
    with pytest.raises(UsageError, match="needs data"):
        sensitivity(small(), QuantizeConfig(), Context())
    program: Program = captured(nn.Sequential(nn.ReLU(), nn.Flatten()), 3, 12, 12)
    with pytest.raises(NothingCompressed):
        sensitivity(program, QuantizeConfig(), context(program))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_sensitivities_are_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    found = found_in(chain())
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path in paths:
        report.plot_sensitivity(found, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_colours_of_a_picture_are_the_same_for_all_networks() -> None:
    """Palest is noise of 50 dB; what is more than the limit allows is black."""
    for network in (chain(), with_outlier_channel(5)):
        ticks = sensitivity_picture(found_in(network)).ticks
        assert min(ticks) == pytest.approx(1e-5)
        assert max(ticks) == pytest.approx(1e-2)
        assert ticks[max(ticks)] == "20 dB"


def test_a_cell_has_the_colour_of_its_number_whatever_the_others_are(tmp_path: Path) -> None:
    """Two pictures that differ in the second cell alone: 0.001, and 0.1, which is beyond the largest tick."""
    image = pytest.importorskip("matplotlib.image")

    def drawn(number: float) -> Tensor:
        picture = HeatMap(["row"], ["a", "b"], [[(1e-4, ""), (number, "")]], "", "", {1e-5: "", 1e-2: ""})
        draw(picture, tmp_path / "a.png")
        return torch.from_numpy(image.imread(tmp_path / "a.png")[:, :, :3].copy())

    usual, beyond = drawn(1e-3), drawn(0.1)
    changed = (usual != beyond).any(2)
    columns = changed.any(0).nonzero().flatten()
    assert 0.2 < float(changed.double().mean()) < 0.5
    assert not beyond[changed].any()  # black
    assert usual[changed].any(1).all()
    assert columns[0] > 0.3 * usual.shape[1]  # the first cell is left as it is


def test_a_cell_of_another_precision_than_its_column_says_so() -> None:
    program, config = small(), QuantizeConfig(act_bits=4)
    found = sensitivity(program, config, context(program), timed=False)
    console = Console(width=300, record=True, file=StringIO())
    console.print(report.sensitivity_table(found))
    rows = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    cells = dict(zip((layer.name for layer in found.layers), sensitivity_picture(found).cells, strict=True))
    (heading,) = sensitivity_picture(found).columns
    for name, precision in {"stem": "int8", "body": "W8A4", "dw": "W8A4", "fc": "int8"}.items():
        said = "" if precision == heading else f" ({precision})"
        assert f" {by_name(found)[name].int8.snr_db:.1f}{said} " in rows[name]
        assert [text for _, text in filter(None, cells[name])] == [
            f"{by_name(found)[name].int8.snr_db:.1f} dB{said}"
        ]


def test_a_layer_without_a_reason_has_a_dash_in_the_table() -> None:
    console = Console(width=300, record=True, file=StringIO())
    console.print(report.sensitivity_table(found_in(chain())))
    first = next(line for line in console.export_text().splitlines() if line.startswith("first"))
    assert first.rstrip().endswith("–")


def test_a_network_that_loses_nothing_is_not_told_who_loses_most() -> None:
    found = found_in(chain())
    equal = [replace(layer, int8=replace(layer.int8, snr_db=200.0)) for layer in found.layers]
    assert sentences(replace(found, layers=tuple(equal))) == [
        "no layer alone loses anything: the outputs stay equal"
    ]


def test_sensitivities_in_json_say_what_the_table_says() -> None:
    data = report.sensitivity_json(found_in(chain()))
    assert [layer["name"] for layer in data["sensitivity"]] == ["first", "second", "third", "fc"]
    losses = data["sensitivity"][0]["losses"]
    assert [loss["precision"] for loss in losses] == ["float32", "int8"]
    assert losses[0]["divergence"] == 0
    assert data["in_words"]


def test_an_embedding_is_rounded_where_it_is_read() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.fc = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.rows(x).mean(1))
            return logits

    torch.manual_seed(0)
    spec = InputSpec((5,), dtype="int64")
    program = capture(Text().eval(), spec, verify=False)
    ids = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))
    found = by_name(sensitivity(program, QuantizeConfig(), Context(data=Images(ids))))  # type: ignore[arg-type]
    rounded = Text().eval()
    rounded.load_state_dict({name: tensor.clone() for name, tensor in program.state_dict().items()})
    with torch.no_grad():
        rows = rounded.rows.weight
        scale = rows.abs().amax(1, keepdim=True) / 127
        rows.copy_((rows / scale).round() * scale)
        assert found["rows"].losses[1].snr_db == pytest.approx(sqnr(program(ids), rounded(ids)), abs=0.05)
