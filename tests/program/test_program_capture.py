import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import CaptureError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.safe_names import path_in_network
from modelopt_cli.program.serialization import from_data, state_of, to_data

SHAPE = (3, 12, 12)


def net(forward: Any, **layers: nn.Module) -> nn.Module:
    """A module with these layers whose forward is the given function of (self, x)."""
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module  # type: ignore[no-any-return]


def check(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Program:
    """Capture, compare at batch sizes that capture itself does not try, and once more after a round trip."""
    program = capture(model, InputSpec(shape))
    again = from_data(to_data(program), state_of(program))
    model.eval()
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, *shape)
            expected = model(x.clone())
            assert torch.equal(program(x.clone()), expected)
            assert torch.equal(again(x.clone()), expected)
    return program


def called(program: Program) -> list[str]:
    return [
        type(program.get_submodule(str(n.target))).__name__
        for n in program.graph.find_nodes(op="call_module")
    ]


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3)


class TestProgram:
    def test_says_what_it_was_told(self) -> None:
        program = capture(conv(), InputSpec(SHAPE), labels=["a", "b"], arch="builtin:x")
        assert isinstance(program, Program)
        free = InputSpec(SHAPE, free=(1, 2))
        assert (program.input, program.labels, program.arch) == (free, ("a", "b"), "builtin:x")
        assert program.history == ()
        assert program.encodings == {}

    def test_model_keeps_its_modes_and_gains_no_attributes(self) -> None:
        model = net(lambda self, x: self.bn(self.conv(x)) + torch.ones(1), conv=conv(), bn=nn.BatchNorm2d(4))
        model.train()
        model.bn.eval()
        before = set(vars(model))
        program = capture(model, InputSpec(SHAPE))
        assert [m.training for m in model.modules()] == [True, True, False]
        assert set(vars(model)) == before
        assert not any(m.training for m in program.modules())

    def test_shares_tensors_but_not_modules(self) -> None:
        model = nn.Sequential(conv(), nn.ReLU())
        program = capture(model, InputSpec(SHAPE))
        own = program.get_submodule("0")
        assert own is not model[0]
        assert own.weight is model[0].weight
        program.train()
        assert not model[0].eval().training

    def test_global_random_state_is_untouched(self) -> None:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        capture(nn.Sequential(nn.Flatten()), InputSpec(SHAPE))
        assert torch.equal(torch.get_rng_state(), state)

    def test_trains(self) -> None:
        program = capture(
            nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 2)), InputSpec(SHAPE)
        )
        program.train()
        program(torch.randn(4, *SHAPE)).sum().backward()
        assert all(p.grad is not None for p in program.parameters())
        assert program.get_submodule("1").num_batches_tracked == 1

    def test_what_is_not_used_is_left_out(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            self.aux(x)
            return self.conv(x)  # type: ignore[no-any-return]

        program = check(net(forward, conv=conv(), aux=conv()))
        assert set(program.state_dict()) == {"conv.weight", "conv.bias"}

    def test_unused_result_of_in_place_call_counts(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.relu(y)
            F.hardtanh(y, 0.0, 0.5, inplace=True)
            y.mul_(3.0)
            return y  # type: ignore[no-any-return]

        check(net(forward, conv=conv(), relu=nn.ReLU(inplace=True)))

    def test_optional_arguments_keep_their_defaults(self) -> None:
        def forward(self: Any, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
            return self.conv(x) * scale if mask is None else x  # type: ignore[no-any-return]

        assert len(check(net(forward, conv=conv())).graph.find_nodes(op="placeholder")) == 1

    def test_layer_called_twice_stays_one_layer(self) -> None:
        program = check(net(lambda self, x: self.c(self.c(x)), c=nn.Conv2d(3, 3, 3)))
        assert [n.target for n in program.graph.find_nodes(op="call_module")] == ["c", "c"]
        assert len(program.state_dict()) == 2

    def test_tied_parameters_stay_tied(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 432), nn.Linear(432, 432))
        model[2].weight = model[1].weight
        program = check(model)
        again = from_data(to_data(program), state_of(program))
        assert again.get_submodule("1").weight is again.get_submodule("2").weight
        assert set(state_of(program)) == {"1.weight", "1.bias", "2.bias"}

    def test_buffers_of_all_sorts(self) -> None:
        class Offsets(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("kept", torch.randn(3, 1, 1))
                self.register_buffer("derived", torch.randn(3, 1, 1), persistent=False)
                self.plain = torch.randn(3, 1, 1)
                self.weight = nn.Parameter(torch.randn(3, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return (
                    x * self.weight
                    + self.kept
                    + self.derived
                    + self.plain
                    + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
                )

        program = check(nn.Sequential(Offsets()))
        assert {"0.weight", "0.kept", "0.derived", "0.plain"} < set(program.state_dict())
        assert [name for name, _ in program.named_parameters()] == ["0.weight"]

    def test_autograd_function_in_python_is_followed(self) -> None:
        class Swish(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
                ctx.save_for_backward(x)
                return x * torch.sigmoid(x)

        apply = torch.autograd.Function.__dict__["apply"]
        check(net(lambda self, x: Swish.apply(self.conv(x)), conv=conv()))
        assert torch.autograd.Function.__dict__["apply"] is apply

    def test_half_precision_model(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).bfloat16()
        program = capture(model, InputSpec(SHAPE))
        again = from_data(to_data(program), state_of(program))
        assert again.get_submodule("1").weight.dtype == torch.bfloat16

    def test_wrapped_for_data_parallel(self) -> None:
        program = capture(nn.DataParallel(nn.Sequential(conv())), InputSpec(SHAPE))
        assert set(program.state_dict()) == {"0.weight", "0.bias"}

    def test_transformer_encoder_layer(self) -> None:
        layer = nn.TransformerEncoderLayer(12, 2, 8, batch_first=True, norm_first=True)
        program = check(net(lambda self, x: self.t(x.flatten(1, 2)).mean(1), t=layer))
        assert "MultiheadAttention" in called(program)


class TestSizes:
    """Where Python needs a number, sizes become literals; the batch size never does."""

    def test_stay_symbolic_where_they_can(self) -> None:
        program = check(net(lambda self, x: x.reshape(x.shape[0], x.shape[1] * 4, -1)))
        x = torch.randn(2, 3, 20, 20)
        assert program(x).shape == (2, 12, 100)

    @pytest.mark.parametrize(
        "forward",
        [
            pytest.param(lambda self, x: F.pad(x, [math.ceil(x.size(2) / 5)] * 4), id="ceil"),
            pytest.param(lambda self, x: x if x.shape[-2:] == (12, 12) else -x, id="shape-compared"),
            pytest.param(lambda self, x: sum(x[:, i] * i for i in range(x.shape[1])), id="range"),
            pytest.param(lambda self, x: x.view(x.size(0), len(x.shape) * 3, -1), id="len"),
            pytest.param(lambda self, x: x * 2 if x.dim() == 4 and x.ndim > 3 else x, id="rank"),
            pytest.param(lambda self, x: x.view(*x.shape[:2], -1), id="starred-shape"),
            pytest.param(
                lambda self, x: torch.cat([p * 2 for p in x.split(1, dim=1)], 1), id="iterated-split"
            ),
            pytest.param(
                lambda self, x: x.view(x.shape[0] * 3, -1).view(-1, 3, 144), id="batch-in-arithmetic"
            ),
            pytest.param(lambda self, x: F.interpolate(x, [int(s * 1.5) for s in x.shape[2:]]), id="int"),
            pytest.param(lambda self, x: F.avg_pool2d(x, min(x.shape[2], 4)), id="min"),
            pytest.param(lambda self, x: x / math.sqrt(x.shape[1]), id="sqrt"),
            pytest.param(lambda self, x: x if x.dtype == torch.float32 else x.float(), id="dtype"),
            pytest.param(lambda self, x: x if x.device.type == "cpu" else -x, id="device"),
            pytest.param(lambda self, x: x + torch.arange(x.shape[3], device=x.device), id="arange"),
            pytest.param(lambda self, x: x if x.shape[0] > 0 else -x, id="batch-compared-harmlessly"),
            pytest.param(lambda self, x: x.mean((2, 3)) + torch.zeros((x.shape[0], 3)), id="zeros"),
            pytest.param(lambda self, x: x.new_zeros(x.shape[0], len(x.shape)), id="new-zeros"),
            pytest.param(lambda self, x: x.max(dim=1 if len(x.shape) else 0).values, id="named-tuple"),
            pytest.param(lambda self, x: x[..., : x.shape[-1] // 2] if bool(x.shape[1]) else x, id="slice"),
        ],
    )
    def test_become_literals_where_they_must(self, forward: Any) -> None:
        check(net(forward))

    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_same_padding_convolution(self, size: int, stride: int) -> None:
        class Same(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                ih, iw = x.size()[-2:]
                kh, kw = self.weight.size()[-2:]
                oh, ow = math.ceil(ih / self.stride[0]), math.ceil(iw / self.stride[1])
                h = max((oh - 1) * self.stride[0] + kh - ih, 0)
                w = max((ow - 1) * self.stride[1] + kw - iw, 0)
                if h > 0 or w > 0:
                    x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
                return F.conv2d(
                    x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
                )

        program = check(nn.Sequential(Same(3, 4, size, stride)))
        assert called(program) == ["Conv2d"]
        assert set(program.state_dict()) == {"0.weight", "0.bias"}
        pads = [n for n in program.graph.nodes if n.target is F.pad]
        assert all(type(v) is int for n in pads for v in n.kwargs["pad"])
        assert len(pads) <= 1

    @pytest.mark.parametrize(
        "forward",
        [
            pytest.param(lambda self, x: torch.stack([image * 2 for image in x]), id="iterated"),
            pytest.param(lambda self, x: x.view(int(x.shape[0]), -1), id="int"),
            pytest.param(lambda self, x: sum(x[i] for i in range(x.shape[0])), id="range"),
            pytest.param(lambda self, x: x * len(x), id="len"),
            pytest.param(lambda self, x: x if x.shape[0] == 2 else x * 2, id="compared"),
            pytest.param(lambda self, x: x if x.shape[0] % 2 else x * 2, id="odd"),
        ],
    )
    def test_batch_size_as_a_number_is_refused(self, forward: Any) -> None:
        with pytest.raises(CaptureError, match="batch size is needed as a number") as caught:
            capture(net(forward), InputSpec(SHAPE))
        assert "test_program_capture.py:" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_batch_of_one_treated_differently_is_noticed(self) -> None:
        model = net(lambda self, x: x * 2 if x.shape[0] > 1 else x)
        with pytest.raises(CaptureError, match=r"not compute what the network does .*\(1, 3, 12, 12\)"):
            capture(model, InputSpec(SHAPE))


class TestRefusals:
    """One line: what, in which layer, and where in the user's file."""

    @pytest.mark.parametrize(
        "forward",
        [
            pytest.param(lambda self, x: x if x.sum() > 0 else -x, id="if"),
            pytest.param(lambda self, x: x * x.mean().item(), id="item"),
            pytest.param(lambda self, x: x * float(x.mean()), id="float"),
            pytest.param(lambda self, x: x if torch.equal(x, x * 2) else -x, id="equal"),
            pytest.param(lambda self, x: x[:, : int(x.abs().max())], id="int"),
        ],
    )
    def test_control_flow_on_data(self, forward: Any) -> None:
        model = nn.Sequential(conv(), net(forward))
        with pytest.raises(CaptureError, match="depends on the values in a tensor") as caught:
            capture(model, InputSpec(SHAPE))
        assert caught.value.where is not None
        assert caught.value.where.startswith("1 (test_program_capture.py:")

    @pytest.mark.parametrize(
        ("forward", "name"),
        [
            pytest.param(lambda self, x: torch.special.erfcx(x), "erfcx", id="function"),
            pytest.param(lambda self, x: x.polygamma(1), "polygamma", id="method"),
            pytest.param(lambda self, x: x.data, "attribute data", id="attribute"),
            pytest.param(lambda self, x: x + torch.rand_like(x), "rand_like", id="chance"),
        ],
    )
    def test_what_is_not_on_the_list(self, forward: Any, name: str) -> None:
        with pytest.raises(CaptureError, match=name) as caught:
            capture(nn.Sequential(nn.Sequential(net(forward))), InputSpec(SHAPE))
        assert str(caught.value.where).partition(" ")[0] == "0.0"

    def test_exception_of_the_network(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            raise KeyError("first line\nsecond line")

        with pytest.raises(CaptureError, match="KeyError") as caught:
            capture(net(forward), InputSpec(SHAPE))
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize(
        "forward",
        [
            pytest.param(lambda self, x: 3, id="number"),
            pytest.param(lambda self, x: (x, "y"), id="string"),
            pytest.param(lambda self, x: {"out": x, "size": x.shape[1]}, id="size"),
        ],
    )
    def test_anything_but_tensors(self, forward: Any) -> None:
        with pytest.raises(CaptureError, match="not a tensor"):
            capture(net(forward), InputSpec(SHAPE))

    def test_two_inputs(self) -> None:
        with pytest.raises(CaptureError, match=r"the network needs 2 inputs \(x, y\), and 1 is described"):
            capture(net(lambda self, x, y: x + y), InputSpec(SHAPE))

    def test_wrong_input_size(self) -> None:
        with pytest.raises(CaptureError, match=r"cannot process an input of shape|while following"):
            capture(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), InputSpec(SHAPE))

    def test_torchscript(self) -> None:
        with (
            pytest.warns(DeprecationWarning, match="torch.jit"),
            pytest.raises(CaptureError, match="TorchScript"),
        ):
            capture(torch.jit.trace(conv(), torch.randn(1, *SHAPE)), InputSpec(SHAPE))

    @pytest.mark.parametrize("name", ["input", "labels", "history", "graph", "code", "meta"])
    def test_layer_with_a_name_of_ours(self, name: str) -> None:
        model = nn.Sequential()
        model.add_module(name, conv())
        model.add_module(f"{name}_", nn.Conv2d(4, 4, 1))
        model.add_module(f"{name}__", nn.Conv2d(4, 4, 1))
        model.add_module("other", nn.Sequential())
        model.other.add_module(name, nn.Conv2d(4, 4, 1))
        program = check(model)
        layers = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
        assert layers == [f"{name}__", f"{name}_", f"{name}____", f"other.{name}"]
        back = {path_in_network(path): tensor for path, tensor in program.state_dict().items()}
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, back[path]) for path, tensor in model.state_dict().items())

    @pytest.mark.parametrize("name", ["input", "labels", "graph"])
    def test_tensors_with_a_name_of_ours(self, name: str) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer(name, torch.randn(3, 1, 1))
                self.arch = nn.Parameter(torch.randn(3, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return x * getattr(self, name) + self.arch

        program = check(Net())
        assert program.state_dict().keys() == {f"{name}__", "arch__"}
        assert program.input.shape == SHAPE

    @pytest.mark.parametrize("name", ['a"b', "a b", "ä", "a'", "x\n", "__class"])
    def test_layer_with_odd_characters(self, name: str) -> None:
        with pytest.raises(CaptureError, match="odd characters"):
            capture(net(lambda self, x: self.d[name](x), d=nn.ModuleDict({name: conv()})), InputSpec(SHAPE))

    def test_verification_can_be_left_out(self) -> None:
        model = nn.Sequential(conv())
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        capture(model, InputSpec(SHAPE), verify=False)

    def test_node_names_cannot_shadow_what_code_uses(self) -> None:
        model = net(lambda self, x: self.torch(self.self(x)), torch=nn.ReLU())
        model.add_module("self", conv())
        check(model)
