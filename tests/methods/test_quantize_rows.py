"""Contracts of the rows of ``SCHEMES`` and ``OBSERVERS``: each runs from a file to a file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli import api, artifact
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.data import open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.measure.output_comparison import snr_db
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.histogram import Histogram
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.schemes import SCHEMES, NetworkForm
from modelopt_cli.methods.quantize.state_dict import apply_to_state
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.quantized import Weighted

ONE = EvalOptions(threads=1)


class Net(nn.Module):
    """A layer of every kind that some scheme takes, on the digits' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 16, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.head(self.norm(self.fc(x).relu()))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rows") / "net.safetensors"
    artifact.write_program(capture(Net().eval(), InputSpec((1, 8, 8)), verify=False), path)
    return path


def through_files(source: Path, folder: Path, config: QuantizeConfig, **options: Any) -> Program:
    """The network that the file made of ``source`` holds, after every claim about the file is checked."""
    output = folder / "out.safetensors"
    outcome = api.quantize(
        source, output, config=config, data="digits", evaluate=False, options=ONE, **options
    )
    scheme = SCHEMES[config.scheme]
    assert outcome.snr_db is not None
    assert outcome.snr_db >= scheme.least_snr_db
    assert output.stat().st_size < source.stat().st_size
    before, after = artifact.read_program(source), artifact.read_program(output)
    data = open_data("digits", input_spec=before.input) if config.needs_data else None
    in_memory = apply(before, config, Context(data=data, batch_size=ONE.data_batch_size)).program
    torch.manual_seed(1)
    x = torch.rand(16, 1, 8, 8)
    with torch.inference_mode():
        assert snr_db(before(x), after(x)) >= scheme.least_snr_db
        assert torch.equal(in_memory(x), after(x))
    return after


def integers(program: Program) -> dict[str, Tensor]:
    """The integer weights, by layer."""
    found = {name: m.weight for name, m in program.named_modules() if isinstance(m, Weighted)}
    for name, encoding in program.encodings.items():
        if encoding.codec == "affine":
            scale = encoding.parts["scale"].reshape(-1, *[1] * (program.get_parameter(name).dim() - 1))
            found[name.removesuffix(".weight")] = (program.get_parameter(name) / scale).round()
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_makes_integers_of_its_layers_and_of_no_others(
    name: str, source: Path, tmp_path: Path
) -> None:
    scheme = SCHEMES[name]
    float_layers = dict(artifact.read_program(source).named_modules())
    made = through_files(source, tmp_path, QuantizeConfig(scheme=name), code=scheme.code)
    weights = integers(made)
    weighty = {n: m for n, m in float_layers.items() if getattr(m, "weight", None) is not None}
    kinds = {n: type(m).__name__ for n, m in weighty.items() if m.weight.dim() > 1}  # type: ignore[operator]
    if scheme.float_type is not None:
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[scheme.float_type]
        cast = {n.removesuffix(".weight") for n, e in made.encodings.items() if e.codec == "cast"}
        assert cast == kinds.keys()
        assert all(
            torch.equal(w, w.to(dtype).float()) for w in (made.get_parameter(f"{n}.weight") for n in cast)
        )
        assert not any(isinstance(m, Weighted) for m in made.modules())
        return
    assert weights.keys() == {n for n, kind in kinds.items() if not scheme.layers or kind in scheme.layers}
    largest = 2 ** (scheme.weight_bits - 1) - 1
    assert all(largest / 2 < int(weight.abs().max()) <= largest for weight in weights.values())
    multiplies = any(isinstance(m, Weighted) for m in made.modules())
    assert multiplies == scheme.integer_arithmetic


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_needs_the_data_that_its_row_says(name: str, source: Path, tmp_path: Path) -> None:
    config, output = QuantizeConfig(scheme=name), tmp_path / "out.safetensors"
    run = {"config": config, "evaluate": False, "options": ONE}
    if SCHEMES[name].needs_calibration:
        with pytest.raises(UsageError, match=f"^{SCHEMES[name].title} needs data") as caught:
            api.quantize(source, output, **run)
        assert all(
            f"{other}" in str(caught.value.hint)
            for other, row in SCHEMES.items()
            if not row.needs_calibration
        )
        return
    api.quantize(source, output, **run)
    last = artifact.read_header(output)["history"][-1]
    assert "calibration" not in last
    assert last["config"]["scheme"] == name


@pytest.mark.parametrize("given", list(NetworkForm), ids=lambda given: given.name.lower())
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_needs_the_network_that_its_row_says(name: str, given: NetworkForm) -> None:
    if given is NetworkForm.GRAPH:
        return
    net = Net()
    layers = None if given is NetworkForm.TENSORS else dict(net.named_modules())
    if given < SCHEMES[name].source:
        with pytest.raises(UsageError, match=f"scheme {name} needs a network"):
            apply_to_state(net.state_dict(), QuantizeConfig(name), layers)
        return
    result = apply_to_state(net.state_dict(), QuantizeConfig(name), layers)
    stored = {item[0] for item in result.stream.items() if item[2].codec in ("affine", "cast")}
    expected = {"fc.weight", "head.weight"} | ({"conv.weight"} if not SCHEMES[name].layers else set())
    assert stored == expected


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_calibrates_a_network(name: str, source: Path, tmp_path: Path) -> None:
    observed = [scheme for scheme, row in SCHEMES.items() if row.needs_calibration]
    for scheme in observed:
        through_files(source, tmp_path, QuantizeConfig(scheme=scheme, observer=name))
    assert observed


ROUNDED = [
    pytest.param(scheme, name, marks=[pytest.mark.slow] if rounding.learned else [])
    for name, rounding in ROUNDINGS.items()
    for scheme, row in SCHEMES.items()
    if rounding.needs_data
    and (row.needs_calibration or (rounding.of_stored and row.activation_bits is row.float_type is None))
]


@pytest.mark.parametrize(("scheme", "name"), ROUNDED)
def test_a_rounding_chooses_other_integers_than_the_nearest(
    scheme: str, name: str, source: Path, tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"rounding_steps": 20} if ROUNDINGS[name].learned else {}
    made = integers(through_files(source, tmp_path, QuantizeConfig(scheme, rounding=name, **steps)))
    assert artifact.read_header(tmp_path / "out.safetensors")["history"][-1]["calibration"].startswith(
        "digits"
    )
    context = Context(data=open_data("digits", input_spec=artifact.read_program(source).input))
    nearest = integers(apply(artifact.read_program(source), QuantizeConfig(scheme), context).program)
    assert made.keys() == nearest.keys()
    assert all(bool((made[layer] != nearest[layer]).any()) for layer in made)


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_looks_only_at_what_its_row_says(name: str) -> None:
    seen = Histogram(OBSERVERS[name].choose, OBSERVERS[name].needs_counts)
    seen.update(torch.linspace(-1, 3, 101))
    assert bool(seen.counts.any()) == OBSERVERS[name].needs_counts
    low, high = OBSERVERS[name].choose(seen)
    assert -3 <= low < 0 < high <= 3  # no wider than the largest magnitude


def test_default_codes_exist() -> None:
    assert {scheme.code for scheme in SCHEMES.values()} <= set(CODINGS)


def test_settings_and_rows_import_no_torch() -> None:
    code = "import sys, modelopt_cli.methods.quantize.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
