"""The page of real networks, without a network: what is measured again, and what stays."""

import pytest

from benchmarks import real_networks
from benchmarks.real.networks import NETWORKS

FOUND = {
    "measured": "2026-01-31, a CPU",
    "compressed": {"layers": 6, "of_layers": 7},
    "evaluation": {
        "models": [
            {"samples": 30, "file_bytes": 1_240_000, "metrics": {"auc": 96.625}},
            {"samples": 30, "file_bytes": 620_000, "metrics": {"auc": 96.5}},
        ],
        "comparisons": [
            {"drops": {"auc": {"drop": 0.125, "low": -0.5, "high": 0.25}}, "snr_db": 18.2, "ratio": 2.0}
        ],
    },
}


def test_networks_that_are_not_named_keep_their_lines(tmp_path, monkeypatch, capsys):
    asked = []

    def run(name: str, method: str, folder: object) -> dict[str, object]:
        asked.append((name, method))
        return FOUND

    monkeypatch.setattr(real_networks, "run", run)
    output = tmp_path / "page.md"
    output.write_text("| Legere | old row |\n| Silero VAD | old row |\n\n- **Legere** (then): old note\n")
    monkeypatch.setattr("sys.argv", ["", "Silero VAD", "--folder", str(tmp_path), "--output", str(output)])
    real_networks.main()
    assert asked == [("Silero VAD", method) for method in NETWORKS["Silero VAD"].methods]
    lines = output.read_text().splitlines()
    assert lines[4] == "| Legere | old row |"
    metric = "auc, 30 | 96.62 | 96.50 | 0.1250 (-0.5000 to 0.2500) | 0.13 % | 18.2 dB"
    assert lines[5] == f"| Silero VAD | int8 | {metric} | 1.24 to 0.62 MB, 2.00x | 6 of 7 |"
    assert lines[5 + len(asked)] == ""
    assert lines[-2] == "- **Legere** (then): old note"
    assert lines[-1].startswith("- **Silero VAD** (2026-01-31, a CPU): 30 mixtures")
    assert capsys.readouterr().out.count("| Silero VAD |") == len(asked)


def test_an_unknown_network_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "Silero"])
    with pytest.raises(SystemExit, match="2"):
        real_networks.main()
    assert "no network is called Silero; there are MobileNetV2, " in capsys.readouterr().err
