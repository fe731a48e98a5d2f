"""Files of torch.save: every format, and every way one can lie."""

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from shlex import split

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from modelopt_cli.checkpoint import read_state
from modelopt_cli.errors import CheckpointError, EnvironmentFailure

Refusal = Callable[[Path], str]
State = dict[str, torch.Tensor]
FORMATS = {"zip": True, "legacy": False}


def save(obj: object, path: Path, kind: str = "zip") -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", FORMATS)
class TestWhatIsRead:
    def test_a_state_dict_comes_back_bit_for_bit(self, kind: str, state: State, tmp_path: Path) -> None:
        found = read_state(save(OrderedDict(state), tmp_path / "a.pth", kind))
        assert same(found.state, state)
        assert found.source == f"torch-{kind}"
        assert found.notes == ()

    def test_the_name_is_not_believed(self, kind: str, state: State, tmp_path: Path) -> None:
        # torch.load itself would hand this to another library because of its name
        assert same(read_state(save(state, tmp_path / "a.safetensors", kind)).state, state)

    def test_the_hash_is_that_of_the_bytes(self, kind: str, state: State, tmp_path: Path) -> None:
        import hashlib

        path = save(state, tmp_path / "a.pth", kind)
        assert read_state(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_every_supported_dtype(self, kind: str, tmp_path: Path) -> None:
        from modelopt_cli.checkpoint.tensor_checks import DTYPES

        # torch 2.13 cannot read back the float8 tensors that it writes in the legacy format
        dtypes = [d for d in sorted(DTYPES, key=str) if kind == "zip" or "float8" not in str(d)]
        tensors = {str(dtype): torch.zeros(3, 2).to(dtype) for dtype in dtypes}
        found = read_state(save(tensors, tmp_path / "a.pth", kind)).state
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            n: t.dtype for n, t in tensors.items()
        }

    def test_views_of_one_buffer_and_tied_tensors(self, kind: str, tmp_path: Path) -> None:
        flat = torch.arange(24.0)
        tensors = {"a": flat[:6].view(2, 3), "b": flat[6:].view(3, 6).t(), "c": flat}
        assert same(read_state(save(tensors, tmp_path / "a.pth", kind)).state, tensors)

    def test_a_file_saved_from_cuda_is_read_on_the_cpu(
        self, kind: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        path = save(state, tmp_path / "a.pth", kind)
        monkeypatch.undo()
        assert b"cuda:0" in path.read_bytes()
        assert same(read_state(path).state, state)

    def test_parameters_become_plain_tensors(self, kind: str, tmp_path: Path) -> None:
        found = read_state(save({"w": nn.Parameter(torch.ones(3))}, tmp_path / "a.pth", kind)).state
        assert type(found["w"]) is torch.Tensor
        assert not found["w"].requires_grad


class TestCode:
    @pytest.mark.parametrize("kind", [*FORMATS, "pickle", "pickle-5"])
    def test_a_pickle_that_would_run_code_does_not(
        self, kind: str, payload: object, tmp_path: Path, refusal: Refusal
    ) -> None:
        path = tmp_path / "evil.pth"
        if kind in FORMATS:
            save({"state_dict": {"w": torch.ones(2)}, "extra": payload}, path, kind)
        else:
            path.write_bytes(pickle.dumps(payload, protocol=5 if kind == "pickle-5" else 2))
        line = refusal(path)
        assert "posix.system" in line
        assert "was not run" in line
        assert "weights_only" not in line  # no way to run it is offered
        assert not (tmp_path / "it-ran").exists()

    def test_nor_one_in_newer_pickle_instructions(
        self, payload: object, tmp_path: Path, refusal: Refusal
    ) -> None:
        torch.save({"w": torch.ones(2), "extra": payload}, tmp_path / "evil.pth", pickle_protocol=4)
        assert "posix.system" in refusal(tmp_path / "evil.pth")
        assert not (tmp_path / "it-ran").exists()

    def test_newer_pickle_instructions_alone_are_not_called_damage(
        self, state: State, tmp_path: Path, refusal: Refusal
    ) -> None:
        torch.save(state, tmp_path / "a.pth", pickle_protocol=4)
        line = refusal(tmp_path / "a.pth")
        assert "pickle protocol above 3" in line
        assert "damaged" not in line

    @pytest.mark.slow
    @pytest.mark.parametrize("saved", ["module", {"state_dict": "state"}, {"a": "state"}], ids=str)
    def test_the_way_to_convert_a_file_of_a_newer_protocol_works(
        self, saved: object, state: State, tmp_path: Path, refusal: Refusal
    ) -> None:
        module = nn.Sequential(nn.Linear(3, 2))
        whole = saved == "module"
        obj = module if whole else {"state_dict": state} if "state_dict" in str(saved) else state
        torch.save(obj, tmp_path / "it's new.pth", pickle_protocol=4)
        line = refusal(tmp_path / "it's new.pth")
        want = dict(module.state_dict()) if whole else state
        assert same(self.convert(line, tmp_path / "it's new-weights.pth"), want)

    def test_the_way_to_convert_a_plain_pickle_works(
        self, state: State, tmp_path: Path, refusal: Refusal
    ) -> None:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
        line = refusal(tmp_path / "a.pkl")
        assert "torch.save did not write" in line
        assert same(self.convert(line, tmp_path / "a-weights.pth"), state)

    def test_torchscript_is_refused_and_the_way_to_convert_it_works(
        self, tmp_path: Path, refusal: Refusal
    ) -> None:
        module = nn.Sequential(nn.Linear(3, 2))
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.save(torch.jit.trace(module, torch.ones(1, 3)), tmp_path / "a.pt")
        line = refusal(tmp_path / "a.pt")
        assert "TorchScript" in line
        assert same(self.convert(line, tmp_path / "a-weights.pth"), dict(module.state_dict()))

    @staticmethod
    def convert(line: str, target: Path) -> State:
        command = split(line[line.index("python -c") :])
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
        return read_state(target).state


def nested() -> torch.Tensor:
    with pytest.warns(UserWarning, match="nested tensors"):
        return torch._nested_tensor_from_tensor_list([torch.ones(2), torch.ones(3)])


class TestTensorsThatLie:
    def test_a_view_of_four_terabytes(self, tmp_path: Path, refusal: Refusal) -> None:
        path = save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pth")
        assert path.stat().st_size < 4096
        line = refusal(path)
        assert "'w' claims 4,398,046,511,104 bytes and stores 4" in line

    def test_a_legacy_storage_of_four_terabytes(self, tmp_path: Path, refusal: Refusal) -> None:
        path = save({"w": torch.ones(77777)}, tmp_path / "a.pth", "legacy")
        data = path.read_bytes().replace(
            b"J" + struct.pack("<i", 77777), b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
        )
        assert len(data) > path.stat().st_size
        path.write_bytes(data)
        refusal(path)

    def test_many_names_for_one_big_tensor(self, tmp_path: Path, refusal: Refusal) -> None:
        big = torch.zeros(1 << 20)
        path = save({f"w{i}": big for i in range(40)}, tmp_path / "a.pth")
        assert "add up to" in refusal(path)

    @pytest.mark.parametrize(
        ("word", "tensor"),
        [
            ("sparse_coo", torch.eye(3).to_sparse()),
            ("meta", torch.empty(3, device="meta")),
            ("complex64", torch.zeros(3, dtype=torch.complex64)),
            ("nested", nested()),
            ("a negative view", torch.zeros(3, dtype=torch.complex64).conj().imag),
            ("a conjugate view", torch.zeros(3, dtype=torch.complex64).conj()),
        ],
        ids=["sparse", "meta", "complex", "nested", "negative", "conjugate"],
    )
    def test_tensors_that_are_not_plain_arrays(
        self, word: str, tensor: torch.Tensor, tmp_path: Path, refusal: Refusal
    ) -> None:
        line = refusal(save({"ok": torch.ones(2), "odd": tensor}, tmp_path / "a.pth"))
        assert word in line
        assert "'odd'" in line

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_quantized_tensors(self, tmp_path: Path, refusal: Refusal) -> None:
        tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        assert "'odd' is quantized" in refusal(save({"odd": tensor}, tmp_path / "a.pth"))

    def test_a_layer_name_cannot_disturb_the_terminal(self, tmp_path: Path, refusal: Refusal) -> None:
        name = "\x1b[31m[/foo]\nw\u202e"
        line = refusal(save({name: torch.eye(2).to_sparse()}, tmp_path / "a.pth"))
        assert "\\x1b[31m[/foo]\\nw\\u202e" in line


class TestDamage:
    def test_a_zip_bomb(self, tmp_path: Path, refusal: Refusal) -> None:
        path = save({"w": torch.zeros(1 << 22)}, tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        assert (tmp_path / "bomb.pth").stat().st_size < 30_000
        assert "unpack to 16,7" in refusal(tmp_path / "bomb.pth")

    @pytest.mark.parametrize("kind", FORMATS)
    def test_cut_short_anywhere(self, kind: str, state: State, tmp_path: Path, refusal: Refusal) -> None:
        data = save(state, tmp_path / "a.pth", kind).read_bytes()
        for size in [*range(0, 300, 23), *range(300, len(data), len(data) // 40), len(data) - 1]:
            (tmp_path / "cut.pth").write_bytes(data[:size])
            line = refusal(tmp_path / "cut.pth")
            if kind == "zip" and size > 3:
                assert "cut short" in line

    @pytest.mark.parametrize("kind", FORMATS)
    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_bytes_changed_give_tensors_or_a_refusal(
        self, kind: str, state: State, tmp_path: Path, data: st.DataObject
    ) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=FORMATS[kind])
        content = bytearray(buffer.getvalue())
        # most of the file is numbers, where a change is just another number; aim at what is not
        head = st.integers(0, 1500) | st.integers(len(content) - 2500, len(content) - 1)
        for position in data.draw(st.lists(head, min_size=1, max_size=6)):
            content[position] = data.draw(st.integers(0, 255))
        path = tmp_path / "mutated.pth"
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):  # anything else fails
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_state(path).state.values())

    def test_dicts_that_contain_each_other(self, tmp_path: Path, refusal: Refusal) -> None:
        nest: dict[str, object] = {}
        for _ in range(60):
            nest = {"model": nest, "ema": nest, "x": nest}
        refusal(save(nest, tmp_path / "nest.pth"))
        loop: dict[str, object] = {}
        loop["state_dict"] = loop
        refusal(save(loop, tmp_path / "loop.pth"))


class TestFiles:
    def test_missing(self, tmp_path: Path, refusal: Refusal) -> None:
        assert "no such file" in refusal(tmp_path / "none.pth")

    def test_a_device(self, refusal: Refusal) -> None:
        refusal(Path("/dev/null"))

    def test_unreadable(self, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        def denied(*_args: object, **_kwargs: object) -> int:
            raise PermissionError(13, "Permission denied")

        path = save(state, tmp_path / "a.pth")
        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(EnvironmentFailure, match="permission"):
            read_state(path)


def test_torch_load_is_called_in_one_place_and_never_loosely() -> None:
    import ast

    import modelopt_cli

    calls = []
    for source in Path(modelopt_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("torch.load", "pickle.load", "pickle.loads", "jit.load", "export.load", "serialization.load")
            ):
                calls.append((source.name, ast.unparse(node)))
    assert calls == [
        ("torch_file.py", "torch.load(handle, map_location='cpu', weights_only=True, mmap=False)")
    ]


@pytest.mark.slow
def test_the_way_to_convert_a_network_of_torchvision_works(tmp_path: Path, refusal: Refusal) -> None:
    """Where torchvision cannot be imported alone, the line makes it work."""
    code = (
        "import sys, modelopt_cli, torch; from torchvision import models\n"
        "torch.manual_seed(0); net = models.squeezenet1_1(num_classes=3)\n"
        "torch.save(net, sys.argv[1], pickle_protocol=4); torch.save(net.state_dict(), sys.argv[2])"
    )
    paths = [str(tmp_path / "whole.pth"), str(tmp_path / "state.pth")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    found = TestCode.convert(refusal(tmp_path / "whole.pth"), tmp_path / "whole-weights.pth")
    assert same(found, dict(read_state(tmp_path / "state.pth").state))
