"""Building networks from a spec: torchvision, timm, builtin, and the user's own code."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modelopt_cli.checkpoint import resolve
from modelopt_cli.errors import ArchitectureError, EnvironmentFailure
from modelopt_cli.program import InputSpec, Preprocess

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def error_of(spec: str, *, build: bool = False) -> str:
    with pytest.raises(ArchitectureError) as caught:
        resolve(spec).build() if build else resolve(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTorchvision:
    def test_options_reach_the_network(self) -> None:
        module = resolve("torchvision:resnet18?num_classes=10").build()
        assert isinstance(module, nn.Module)
        assert module.get_parameter("fc.weight").shape == (10, 512)

    def test_the_input_is_that_of_the_first_published_weights(self) -> None:
        assert resolve("torchvision:resnet50").input == InputSpec(
            (3, 224, 224), Preprocess(resize=256, crop=224, interpolation="bilinear", **IMAGENET)
        )
        assert resolve("torchvision:efficientnet_b0").input == InputSpec(
            (3, 224, 224), Preprocess(resize=256, crop=224, interpolation="bicubic", **IMAGENET)
        )
        v2 = resolve("torchvision:efficientnet_v2_l").input
        assert v2 is not None
        assert v2.shape == (3, 480, 480)
        assert v2.preprocess is not None
        assert v2.preprocess.mean == (0.5, 0.5, 0.5)

    @pytest.mark.parametrize(
        ("spec", "size", "resize"),
        [
            ("vit_b_16", 224, 256),
            ("vit_b_16?image_size=384", 384, 384),
            ("vit_h_14", 224, 224),
            ("vit_b_32?image_size=256", 256, 256),
        ],
    )
    def test_a_vision_transformer_eats_what_it_was_built_for(self, spec: str, size: int, resize: int) -> None:
        found = resolve(f"torchvision:{spec}").input
        assert found is not None
        assert found.preprocess is not None
        assert (found.shape, found.preprocess.resize, found.preprocess.crop) == (
            (3, size, size),
            resize,
            size,
        )

    def test_networks_of_other_tasks(self) -> None:
        video = resolve("torchvision:r3d_18?num_classes=3")
        assert (type(video.build()).__name__, video.input) == ("VideoResNet", InputSpec((3, 16, 112, 112)))
        assert error_of("torchvision:resnet19").endswith("did you mean torchvision:resnet18?")
        assert error_of("torchvision:quantized_resnet18").endswith("did you mean torchvision:resnet18?")

    def test_labels_only_for_imagenets_thousand_classes(self) -> None:
        labels = resolve("torchvision:resnet18").labels
        assert labels is not None
        assert (len(labels), labels[0], labels[-1]) == (1000, "tench", "toilet tissue")
        assert resolve("torchvision:resnet18?num_classes=10").labels is None

    def test_inception_takes_the_value_range_its_weights_expect(self) -> None:
        assert resolve("torchvision:googlenet").build().transform_input is True
        assert resolve("torchvision:googlenet?transform_input=false").build().transform_input is False

    def test_unknown_names_get_the_nearest(self) -> None:
        assert "did you mean torchvision:resnet50?" in error_of("torchvision:resnet-50")

    def test_unknown_options_are_ours(self) -> None:
        assert "'in_channels'" in error_of("torchvision:resnet18?in_channels=1", build=True)

    def test_what_the_user_says_wins(self) -> None:
        mine = InputSpec((3, 96, 96))
        assert resolve("torchvision:resnet18", mine).input == mine


class TestTimm:
    def test_a_missing_package_is_the_environments_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[timm\]'"):
            resolve("timm:resnet18")

    @pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
    @pytest.mark.filterwarnings("ignore")
    def test_a_network_and_its_input(self) -> None:
        architecture = resolve("timm:resnet18?num_classes=3")
        assert architecture.build()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        assert architecture.input is not None
        assert architecture.input.shape == (3, 224, 224)
        assert "did you mean timm:resnet18?" in error_of("timm:resnet18x")


NET = """
import helper_beside_it
from torch import nn
print("this must not reach stdout")

class Net(nn.Module):
    def __init__(self, classes=4, act="relu"):
        super().__init__()
        self.fc = nn.Linear(helper_beside_it.WIDTH, classes)
        self.act = act
    @classmethod
    def from_name(cls, name):
        return cls(act=name)

def make(classes=4):
    import later_import
    return Net(classes)
def lazy():
    return nn.LazyLinear(3)
def fails():
    x = 1
    return undefined_name
def not_a_module():
    return 3
def leaves():
    raise SystemExit(7)
ready = Net(9)
number = 5
"""


class TestUserCode:
    @pytest.fixture
    def net(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "net.py").write_text(NET)
        (tmp_path / "helper_beside_it.py").write_text("WIDTH = 3")
        (tmp_path / "later_import.py").write_text("")
        for name in ("helper_beside_it", "later_import", "net"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return str(tmp_path / "net.py")

    @pytest.mark.parametrize(
        ("call", "classes"),
        [
            ("Net", 4),
            ("Net?classes=7", 7),
            ("make?classes=5", 5),
            ("ready", 9),
            ("Net.from_name?name=gelu", 4),
        ],
    )
    def test_functions_classes_and_instances(self, net: str, call: str, classes: int) -> None:
        built = resolve(f"{net}:{call}").build()
        assert built.get_parameter("fc.weight").shape == (classes, 3)

    def test_a_package_in_the_current_directory(self, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(Path(net).parent)
        assert resolve("net:make?classes=2").build().get_parameter("fc.weight").shape == (2, 3)

    def test_each_build_is_a_network_of_its_own(self, net: str) -> None:
        architecture = resolve(f"{net}:ready")
        assert architecture.build() is not architecture.build()

    def test_what_it_prints_stays_off_stdout(self, net: str, capsys: pytest.CaptureFixture[str]) -> None:
        resolve(f"{net}:make").build()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "this must not reach stdout" in captured.err

    def test_it_says_nothing_about_the_input(self, net: str) -> None:
        assert resolve(f"{net}:make").input is None

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (":mkae", "did you mean 'make'?"),
            (":fails", "building it failed (NameError: name 'undefined_name' is not defined at net.py:22)"),
            (":not_a_module", "returned an int, not a torch.nn.Module"),
            (":leaves", "SystemExit: 7"),
            (":lazy", "lazy returned a network whose weight has no shape yet; run it once"),
            (":number", "'number' is an int, not callable"),
            (":make?clases=3", "unexpected keyword argument 'clases'"),
            ("", "net.py:make (it defines"),
        ],
    )
    def test_errors_are_one_line_with_the_place(self, net: str, call: str, words: str) -> None:
        assert words in error_of(net + call, build=True)

    def test_a_file_that_does_not_parse(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("x = 1\ndef make(:\n")
        assert "at bad.py:2)" in error_of(f"{tmp_path}/bad.py:make")

    def test_a_file_that_imports_what_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "needs.py").write_text("\n\nimport no_such_package_at_all\n")
        line = error_of(f"{tmp_path}/needs.py:make")
        assert "importing it failed (ModuleNotFoundError" in line
        assert "at needs.py:3)" in line

    @pytest.mark.parametrize(
        "spec", ["nowhere/net.py:make", "no_such_package_at_all.nets:make", "torch.nn.nosuch:X"]
    )
    def test_what_is_not_there(self, spec: str) -> None:
        error_of(spec)

    def test_sys_path_gets_the_directory_last(self, net: str) -> None:
        resolve(f"{net}:make").build()
        assert sys.path[-1] == str(Path(net).parent)
        assert sys.path.count(sys.path[-1]) == 1
