"""Sounds as data: lengths, rates, labels and transcripts, and what cannot be read."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelopt_cli.data import Data, open_data
from modelopt_cli.data.sounds import resample
from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.program import InputSpec
from modelopt_cli.tasks import parse_task

soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile is not installed")


def ramp(count: int, first: int = 1) -> np.ndarray:
    """Samples that are numbers of 1/1024, which 16 bits hold exactly."""
    return np.arange(first, first + count, dtype=np.float32) / 1024


def write(path: str, samples: Any, rate: int = 8000) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("cat/a.wav", ramp(4))
    write("dog/b.flac", ramp(8))
    write("dog/c.wav", np.stack([ramp(6), ramp(6, 3)], 1))  # of two channels
    (tmp_path / "dog" / "notes.txt").write_text("-")
    return tmp_path


def opened(text: str = "wav:.", **how: Any) -> Data:
    return open_data(text, labels=False, **how)


def sounds(data: Data) -> list[list[int]]:
    """The numbers of the ramps."""
    inputs, _ = next(data.batches(8))
    assert isinstance(inputs, torch.Tensor)
    return [[round(value) for value in row] for row in (inputs.flatten(1) * 1024).tolist()]


def targets(data: Data) -> Any:
    return next(parse_task(data.source.task or "classify").read_targets(data).batches(8))[1]


def test_folders_are_classes_and_channels_are_averaged() -> None:
    data = opened()
    assert sounds(data) == [[1, 2, 3, 4, 0, 0, 0, 0], [*range(1, 9)], [*range(2, 8), 0, 0]]
    assert targets(data).tolist() == [0, 1, 1]
    assert data.class_names == ("cat", "dog")
    assert any("1 .txt" in note for note in data.notes)
    assert any("2 shorter, and filled up with silence" in note for note in data.notes)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [("", [1, 2, 3, 4]), ("?crop=middle", [3, 4, 5, 6]), ("?crop=end", [5, 6, 7, 8])],
)
def test_a_sound_is_as_long_as_the_network_wants(options: str, wanted: list[int]) -> None:
    data = opened(f"wav:.{options}", input_spec=InputSpec((1, 4)))
    assert next(data.batches(1))[0].shape == (1, 1, 4)
    assert sounds(data)[1] == wanted
    assert any("of 3 sounds, 4 samples each: 2 longer, and cut" in note for note in data.notes)
    assert opened("wav:.?length=5").input.shape == (5,)


def test_a_table_of_labels_or_of_transcripts(here: Path) -> None:
    (here / "a.csv").write_text("path,label\ncat/a.wav,3\ndog/c.wav,0\n")
    assert targets(opened("wav:a.csv")).tolist() == [3, 0]
    (here / "b.csv").write_text("file,transcript\ncat/a.wav,ab\ndog/b.flac,b\n")
    data = opened("wav:b.csv", input_spec=InputSpec((4,), free=(0,)))
    assert data.source.task == "sequence"
    assert data.input.fits((8,))
    assert sounds(data) == [[1, 2, 3, 4, 0, 0, 0, 0], [*range(1, 9)]]  # what is said is not cut away
    read = parse_task("sequence").read_targets(data, ("-", "a", "b"))
    assert next(read.batches(2))[1]["ids"].tolist() == [[1, 2], [2, 0]]


def test_the_settings_of_a_hugging_face_folder(here: Path) -> None:
    (here / ".net").mkdir()
    said = '{"sampling_rate": 16000, "do_normalize": true}'
    (here / ".net" / "preprocessor_config.json").write_text(said)
    inputs, _ = next(opened("wav:.?processor=.net").batches(3))
    assert inputs.shape == (3, 16)
    row = inputs[1]
    assert row.mean().item() == pytest.approx(0, abs=1e-5)
    assert row.var(correction=0).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("have", "want"), [(8000, 16000), (16000, 8000), (44100, 16000), (11025, 16000)])
def test_resampling_gives_the_tone_that_was_there(have: int, want: int) -> None:
    times = torch.arange(have // 4) / have
    tone = torch.sin(2 * math.pi * 440 * times)
    found = resample(tone, have, want)
    assert len(found) == math.ceil(have // 4 * want / have)
    exact = torch.sin(2 * math.pi * 440 * torch.arange(len(found)) / want)
    torch.testing.assert_close(found[200:-200], exact[200:-200], atol=2e-4, rtol=0)


def test_what_a_rate_cannot_hold_is_gone() -> None:
    tone = torch.sin(2 * math.pi * 5000 * torch.arange(8000) / 16000)
    assert resample(tone, 16000, 8000)[100:-100].abs().max() < 1e-3


def test_other_rates_are_resampled_where_one_is_asked_for() -> None:
    write("dog/b.flac", ramp(8), 16000)
    with pytest.raises(DataError, match=r"sounds of 8000 and 16000 samples a second; .*\?rate=16000"):
        opened()
    assert opened("wav:.?rate=16000").input.shape == (12,)


def table(text: str) -> Any:
    return lambda: Path("a.csv").write_text(text)


NOT_READ: dict[str, tuple[Any, str, str]] = {
    "no folder": (None, "wav:none", "none: no such file"),
    "no sounds": (lambda: Path("empty/a").mkdir(parents=True), "wav:empty", "no class folders with sounds"),
    "a class without": (lambda: Path("bird").mkdir(), "wav:.", r"bird: holds no sounds \(\.wav"),
    "no sound": (lambda: Path("cat/b.wav").write_bytes(b"RIFF"), "wav:.", "b.wav: is no sound[^<]*$"),
    "silence of no length": (lambda: write("cat/b.wav", ramp(0)), "wav:.", "b.wav: holds no sound"),
    "the beginning of a file": (
        lambda: Path("cat/a.wav").write_bytes(Path("dog/c.wav").read_bytes()[:-9]),
        "wav:.", r"a.wav: is truncated: \d+ of \d+ bytes are there",
    ),
    "NaN": (
        lambda: soundfile.write("cat/a.wav", np.full(4, np.nan, np.float32), 8000, subtype="FLOAT"),
        "wav:.", "a.wav: holds NaN or infinity",
    ),
    "no such file": (table("path,label\nx.wav,1\n"), "wav:a.csv", "a.csv line 2: no such file: x.wav"),
    "a cell too many": (
        table("path,text\ncat/a.wav,yes, no\n"), "wav:a.csv", "a.csv line 2: has 3 cells, 1 more",
    ),
    "no column": (table("path,label\ncat/a.wav,1\n"), "wav:a.csv?label=kind", "no columns called 'kind'"),
    "a crop": (None, "wav:.?crop=left", "crop is 'left', none of start, middle, end"),
    "a rate": (None, "wav:.?rate=fast", "rate is 'fast', not an integer"),
    "no rate": (None, "wav:.?rate=0", "rate is 0, not an integer above 0"),
    "no length": (None, "wav:.?length=0", "length is 0, not an integer above 0"),
    "no label": (table("path,label\ncat/a.wav,1\n"), "wav:a.csv?label=", "label is empty; name a column"),
    "a processor": (None, "wav:.?processor=none", "none: no such folder"),
    "odd rates": (None, "wav:.?rate=99999989", "no small ratio"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_cannot_be_read(kind: str) -> None:
    prepare, text, words = NOT_READ[kind]
    if prepare is not None:
        prepare()

    with pytest.raises(DataError, match=words) as caught:
        targets(opened(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [0, 2**31 - 2**12, 2**32 - 1])
def test_a_file_that_was_written_as_a_stream_may_be_as_long_as_it_is(said: int) -> None:
    whole = Path("cat/a.wav").read_bytes()
    Path("cat/a.wav").write_bytes(whole[:4] + said.to_bytes(4, "little") + whole[8:])
    assert sounds(opened())[0][:4] == [1, 2, 3, 4]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_samples_of_any_width(subtype: str) -> None:
    samples = np.array([0.5, -0.25, 0.125, -1.0])  # which all of them hold exactly
    soundfile.write("cat/a.wav", np.stack([samples, samples], 1), 8000, subtype=subtype)
    inputs, _ = next(opened().batches(1))
    assert inputs.flatten()[:4].tolist() == samples.tolist()


def test_a_network_that_takes_no_row_of_samples() -> None:
    with pytest.raises(DataError, match=r"the network takes 80x60, not a row of samples"):
        opened(input_spec=InputSpec((80, 60)))


def test_without_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[audio\]'"):
        opened()
