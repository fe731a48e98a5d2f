"""Which network a state dict is, from names and shapes alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fingerprints as tool
import pytest
import torch

from modelopt_cli.checkpoint import describe_nearest, fingerprint, recognise, resolve
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.checkpoint.fingerprint import CLASSIFICATION, fingerprints
from modelopt_cli.checkpoint.recognition import recognise_state
from modelopt_cli.errors import ArchitectureError

ROOT = Path(__file__).parents[2]
PLAIN = [name for name, known in fingerprints().items() if "?" not in name and known.kind == CLASSIFICATION]
OTHERS = [name for name, known in fingerprints().items() if "?" not in name and known.kind != CLASSIFICATION]
TWINS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn")
"""Networks of the same tensors, which differ in the size that they bring images to."""


def weights(name: str, **options: object) -> dict[str, torch.Tensor]:
    """A torchvision network's state dict with one number behind each tensor."""
    state = tool.build(name, **options).state_dict()
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items()}


def spec_of(state: dict[str, torch.Tensor]) -> str | None:
    found = recognise(state)
    return None if found is None else found.spec


def test_the_table_has_all_eighty() -> None:
    from torchvision import models

    assert models.list_models(module=models) == PLAIN
    assert len(PLAIN) == 80
    modules = (models.segmentation, models.detection, models.video, models.optical_flow)
    assert [name for module in modules for name in models.list_models(module=module)] == OTHERS


@pytest.mark.parametrize("name", PLAIN)
def test_torchvision_with_any_number_of_classes(name: str) -> None:
    state = weights(name, num_classes=13)
    assert spec_of(state) == f"torchvision:{name}?num_classes=13"
    head = [key for key, tensor in state.items() if tensor.shape[:1] == (13,)]
    assert head
    for key in head:
        state[key] = torch.zeros(()).expand(1000, *state[key].shape[1:])
    assert spec_of(state) == f"torchvision:{name}"


HEAVY = ("ssdlite", "swin3d", "mvit")
"""Beginnings of the names of networks that take long to build."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(HEAVY) else name
        for name in OTHERS
        if name not in TWINS
    ],
)
def test_torchvision_of_other_tasks(name: str) -> None:
    known = fingerprints()[name]
    classes = {} if known.classes is None else {"num_classes": 13}
    found = recognise(weights(name, **classes))
    assert found is not None
    assert found.spec == f"torchvision:{name}" + ("?num_classes=13" if classes else "")
    tasks = {"segmentation": "segment", "detection": "detect", "video": "classify", "optical_flow": None}
    assert found.task == tasks[known.kind]
    assert found.input == known.inputs[0]
    assert found.labels is None


def test_a_second_classifier_and_names_of_classes() -> None:
    found = recognise(weights("fcn_resnet50", aux_loss=True))
    assert found is not None
    assert found.spec == "torchvision:fcn_resnet50?aux_loss=true"
    assert found.labels is not None
    assert found.labels[:2] == ("__background__", "aeroplane")
    labels = resolve("torchvision:ssd300_vgg16").labels
    assert labels is not None
    assert len(set(labels)) == len(labels) == 91


def test_networks_of_the_same_tensors_are_both_named() -> None:
    with pytest.raises(ArchitectureError, match=f"torchvision:{TWINS[0]}, torchvision:{TWINS[1]}; say which"):
        recognise(weights(TWINS[0]))


def test_no_backbone_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    with tool.meta_parameters():
        assert resolve("torchvision:lraspp_mobilenet_v3_large?num_classes=3").build() is not None


@pytest.mark.slow
def test_the_time_it_takes() -> None:
    script = (
        "import torch, json, sys, time; from torch import nn; start = time.perf_counter();"
        "from modelopt_cli.checkpoint import recognise;"
        "shapes = json.load(sys.stdin); state = {k: torch.zeros(()).expand(s) for k, s in shapes.items()};"
        "spec = recognise(state).spec; print(spec, time.perf_counter() - start);"
        "assert 'torchvision' not in sys.modules"
    )
    shapes = {name: list(tensor.shape) for name, tensor in weights("efficientnet_v2_l").items()}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(shapes),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    spec, seconds = done.stdout.split()
    print(f"recognised in {float(seconds):.2f} s, imports but torch's included")
    assert spec == "torchvision:efficientnet_v2_l"
    assert float(seconds) < 20  # the aim is 2; this machine may be busy


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_with_and_without_auxiliary_heads(name: str) -> None:
    assert spec_of(weights(name)) == f"torchvision:{name}"
    assert spec_of(weights(name, aux_logits=False)) == f"torchvision:{name}?aux_logits=false"
    assert (
        spec_of(weights(name, aux_logits=False, num_classes=5))
        == f"torchvision:{name}?aux_logits=false&num_classes=5"
    )


def test_a_vision_transformer_of_another_image_size() -> None:
    state = weights("vit_b_16", image_size=384)
    found = recognise(state)
    assert found is not None
    assert found.spec == "torchvision:vit_b_16?image_size=384"
    assert found.input is not None
    assert found.input.shape == (3, 384, 384)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "?num_classes=100",
        "?width=0.25",
        "?width=0.35",
        "?in_channels=4&num_classes=2",
        "?width=3&in_channels=2",
    ],
)
@pytest.mark.parametrize("name", BUILTINS)
def test_builtins_with_their_options(name: str, options: str) -> None:
    state = resolve(f"builtin:{name}{options}").build().state_dict()
    spec = spec_of(dict(state))
    assert spec is not None
    built = resolve(spec).build().state_dict()
    assert {key: tensor.shape for key, tensor in built.items()} == {key: t.shape for key, t in state.items()}
    assert spec.startswith(f"builtin:{name}")
    assert options.count("=") == spec.count("=")


class TestSpellings:
    def test_old_files_have_no_counters(self) -> None:
        state = {k: v for k, v in weights("resnet18").items() if not k.endswith("num_batches_tracked")}
        assert spec_of(state) == "torchvision:resnet18"

    def test_a_lightning_module_beside_its_loss(self) -> None:
        state = {f"model.{k}": v for k, v in weights("resnet18").items()}
        found = recognise_state({**state, "criterion.weight": torch.ones(1000)})
        assert found is not None
        assert found.architecture.spec == "torchvision:resnet18"
        assert list(found.state) == list(weights("resnet18"))

    def test_two_attributes_deep(self) -> None:
        assert (
            spec_of({f"net.backbone.{k}": v for k, v in weights("resnet18").items()})
            == "torchvision:resnet18"
        )

    def test_densenets_published_names(self) -> None:
        old = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v
            for k, v in weights("densenet121").items()
        }
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
        assert spec_of(old) == "torchvision:densenet121"

    def test_vision_transformers_published_names(self) -> None:
        old = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
            for k, v in weights("vit_b_32").items()
        }
        assert old.keys() != weights("vit_b_32").keys()
        assert spec_of(old) == "torchvision:vit_b_32"


class TestWhatIsNotThere:
    def test_a_changed_stem_is_not_recognised_and_the_difference_named(self) -> None:
        state = weights("resnet50")
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
        assert recognise(state) is None
        assert describe_nearest(state) == (
            "closest is torchvision:resnet50, 1 tensor differs, first: "
            "'conv1.weight' is (64, 1, 7, 7) in the file, (64, 3, 7, 7) in the network"
        )

    def test_a_replaced_head(self) -> None:
        state = weights("resnet34")
        state["fc.1.weight"], state["fc.1.bias"] = state.pop("fc.weight"), state.pop("fc.bias")
        assert recognise(state) is None
        assert (
            "torchvision:resnet34, 4 tensors differ, first: 'fc.weight' is not in the file"
            in describe_nearest(state)
        )

    def test_class_counts_that_disagree(self) -> None:
        state = weights("resnet18")
        state["fc.bias"] = torch.zeros(10)
        assert recognise(state) is None

    @pytest.mark.parametrize(
        "state", [{}, {"w": torch.ones(1)}, {"fc.weight": torch.ones(())}], ids=["none", "one", "scalar"]
    )
    def test_nothing_close(self, state: dict[str, torch.Tensor]) -> None:
        assert recognise(state) is None
        assert describe_nearest(state) == "no known network comes close"

    def test_a_users_own_net_with_common_names_is_not_taken_for_ours(self) -> None:
        shapes = {"fc1.weight": (300, 784), "fc1.bias": (300,), "fc2.weight": (100, 300), "fc2.bias": (100,),
                  "fc3.weight": (10, 100), "fc3.bias": (10,)}  # fmt: skip
        assert recognise({name: torch.zeros(shape) for name, shape in shapes.items()}) is None

    def test_several_that_fit_are_all_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alike = {
            **fingerprints(),
            "twin18": fingerprint.Fingerprint("twin18", fingerprints()["resnet18"].tensors, ()),
        }
        monkeypatch.setattr("modelopt_cli.checkpoint.torchvision_networks.fingerprints", lambda: alike)
        with pytest.raises(
            ArchitectureError, match="torchvision:resnet18, torchvision:twin18; say which with arch"
        ):
            recognise(weights("resnet18"))


def test_the_table_is_what_the_tool_makes() -> None:
    """A few networks here; ``python tools/fingerprints.py --check`` compares all."""
    names = ["googlenet", "regnet_y_400mf", "resnet18", "vit_b_32", "lraspp_mobilenet_v3_large", "r3d_18"]
    made = tool.generate(names)
    for name, entry in made["networks"].items():
        assert dict(fingerprint.unpack(made["nodes"], entry["root"])) == fingerprints()[name].tensors
        assert [fingerprint.pack_input(spec) for spec in fingerprints()[name].inputs] == entry["inputs"]


def test_the_tool_notices_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tool.to_text(tool.generate(["resnet18"]))
    monkeypatch.setattr(tool, "generate", lambda: json.loads(text))
    monkeypatch.setattr(tool, "TARGET", tmp_path / "table.json")
    monkeypatch.setattr(sys, "argv", ["fingerprints.py", "--check"])
    assert tool.main() == 1
    (tmp_path / "table.json").write_text(text)
    assert tool.main() == 0
    (tmp_path / "table.json").write_text(text.replace("[64,3,7,7]", "[64,1,7,7]"))
    assert tool.main() == 1
