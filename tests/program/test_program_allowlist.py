"""The list of what a Program may call, gone through against everything that torch has."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_program_capture import net
from torch import Tensor, fx, nn
from torch.overrides import get_overridable_functions, resolve_name

from modelopt_cli.program import InputSpec, allowlist
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

# Everything of torch's that is not on the list, by the reason why not.
LEFT_OUT: dict[str, str] = {
    "the shape of the result depends on the values": """
        argwhere bincount masked_select nonzero nonzero_static unique unique_consecutive
    """,
    "a number or an answer, not a tensor": """
        allclose equal item tolist numpy is_nonzero is_complex is_conj is_contiguous is_distributed
        is_inference is_floating_point is_neg is_same_size is_signed is_coalesced is_pinned is_set_to
        is_shared get_device element_size dim_order stride storage_offset storage_type qscheme numel
        sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum isreal name type broadcast_shapes
    """,
    "chance": """
        bernoulli binomial multinomial poisson normal gumbel_softmax fractional_max_pool2d
        fractional_max_pool3d fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
        native_dropout rand_like randn_like randint_like cauchy_ exponential_ geometric_ log_normal_
        normal_ random_ uniform_ bernoulli_
    """,
    "a loss": """
        binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy
        ctc_loss gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss linear_cross_entropy
        margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
        multilabel_soft_margin_loss nll_loss poisson_nll_loss smooth_l1_loss soft_margin_loss
        triplet_margin_loss triplet_margin_with_distance_loss
    """,
    "quantized, sparse or of one vendor": r"""
        .*quantize.* fbgemm_.* q_.* int_repr miopen_.* fake_quantize.* fused_moving.* choose_qparams.*
        to_mkldnn .*_indices .*sparse.* coalesce is_coalesced dense_dim to_dense hspmm smm saddmm
        sspaddmm indices values values_copy quantized_.* native_.* mkldnn.* _.* hsmm indices_copy
        to_padded_tensor
    """,
    "memory rather than values": r"""
        .*_copy(?<!index_copy) alias.* as_strided.* set_ resize.* share_memory_ pin_memory storage
        untyped_storage data_ptr const_data_ptr record_stream contiguous_format module_load apply_
        map_ map2_ detach_ requires_grad_ retain_grad register_.* backward cpu cuda ipu xpu mtia
        hash_tensor slice_inverse empty_like storage_type unsafe_.* empty new_empty
    """,
    "changes its tensor, where the list has the pure form": r".*_",
    "no network at hand calls it": r"""
        batch_norm_.* cholesky.* corrcoef cov frexp frobenius_norm gcd lcm geqrf gradient histc
        histogram histogramdd igamma igammac index_reduce ldexp lobpcg lu.* mvlgamma nextafter
        norm_except_dim nuclear_norm orgqr ormqr pca_lowrank polygamma put qr slogdet stft istft svd.*
        triangular_solve unravel_index convolution affine_grid_generator grid_sampler_2d
        grid_sampler_3d max_pool1d_with_indices index cfloat cdouble chalf resolve_neg conj_physical
        autocast embedding_bag sym_sqrt cond eig.* householder_product inv_ex ldl_.* lstsq matrix_rank
        solve_ex solve_triangular tensorinv tensorsolve vander airy_ai .*bessel.* .*polynomial.*
        gammainc.* .*multigammaln psi i1.? log_ndtr ndtri erfcx zeta round i0
    """,
}


def test_every_other_function_of_torchs_is_left_out_for_a_reason() -> None:
    patterns = [re.compile(pattern) for reason in LEFT_OUT.values() for pattern in reason.split()]
    functions = {function for group in get_overridable_functions().values() for function in group}
    neither = set()
    for function in functions:
        path = resolve_name(function) or ""
        name = path.rpartition(".")[2]
        method = path.startswith("torch.Tensor")
        listed = name in (allowlist.METHODS if method else allowlist.FUNCTIONS) or function in LISTED
        if name and not listed and not any(pattern.fullmatch(name) for pattern in patterns):
            neither.add(path)
    assert neither == set()


LISTED = set(allowlist.FUNCTIONS.values())


@pytest.mark.parametrize(
    "name", [n for n in allowlist.FUNCTIONS if not n.startswith(("operator.", "getattr"))]
)
def test_generated_code_calls_the_function_itself(name: str) -> None:
    """fx writes a call by the function's name, and has to find the same function under it."""
    graph = fx.Graph()
    graph.output(graph.call_function(allowlist.FUNCTIONS[name], (graph.placeholder("x"),)))
    module = fx.GraphModule(nn.Module(), graph)
    (call,) = re.findall(r"= ([\w.]+)\(x\)", module.code)
    assert eval(call, module.forward.__globals__) is allowlist.FUNCTIONS[name]  # noqa: S307 -- from our table


def test_no_method_gives_a_tensors_contents_away_or_changes_how_it_is_stored() -> None:
    assert all(callable(getattr(Tensor, name)) for name in allowlist.METHODS)
    reasons = ("a number or an answer, not a tensor", "memory rather than values", "chance")
    patterns = [re.compile(pattern) for reason in reasons for pattern in LEFT_OUT[reason].split()]
    allowed = {"numel", "nelement"}
    bad = {m for m in allowlist.METHODS - allowed if any(pattern.fullmatch(m) for pattern in patterns)}
    assert bad == set()


# Calls that networks make: one of each sort that the list has gained, on a tensor of positive values.
CALLS: dict[str, Any] = {
    "addcmul": lambda x: torch.addcmul(x, x, x + 1, value=0.5),
    "addcdiv": lambda x: x.addcdiv(x, x + 1),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "atan2": lambda x: torch.atan2(x, x.roll(1, 1)) + x.hypot(x),
    "nan_to_num": lambda x: torch.nan_to_num(x.log(), neginf=-3.0),
    "topk": lambda x: x.flatten(1).topk(3).values,
    "sort": lambda x: torch.sort(x, dim=-1, descending=True)[0],
    "scatter": lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x),
    "scatter_add": lambda x: x.scatter_add(2, x.argmax(2, keepdim=True), x[:, :, :1]),
    "index_put": lambda x: x.mean((2, 3)).index_put(
        (torch.tensor([0]), torch.tensor([1])), torch.tensor(2.0)
    ),
    "masked_scatter": lambda x: x.masked_scatter(x > 2.0, x.flip(1)) + x.frac(),
    "cumprod": lambda x: x.cumprod(1) + x.cummax(1).values,
    "var_mean": lambda x: sum(torch.var_mean(x, dim=(2, 3))),
    "median": lambda x: x.median(dim=1).values + x.quantile(0.25, dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1) + torch.linalg.norm(x, dim=(1, 2))[:, None],
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "complex": lambda x: (
        torch.view_as_real(torch.polar(x, x)).flatten(2) + torch.fft.fft(x).imag.repeat(1, 1, 2, 1).flatten(2)
    ),
    "cdist": lambda x: torch.cdist(x.flatten(2), x.flatten(2)),
    "outer products": lambda x: (
        torch.einsum("nchw,ndhw->ncd", x, x) + torch.outer(x[0, :, 0, 0], x[0, :, 0, 0])
    ),
    "meshgrid": lambda x: (
        x + torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[0]
    ),
    "linspace": lambda x: x * torch.linspace(-1, 1, x.shape[-1]),
    "hsplit": lambda x: torch.dstack(torch.hsplit(x, 3)),
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1) + torch.tril(x).sum(-1),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :1] * 2, dim=1, start=2),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "attention": lambda x: F.multi_head_attention_forward(
        *[x.flatten(2)] * 3,
        144,
        4,
        *WEIGHTS[:2],
        None,
        None,
        False,
        0.0,
        *WEIGHTS[2:],
        training=False,
        need_weights=False,
    )[0],
}
WEIGHTS = (torch.randn(432, 144), torch.randn(432), torch.randn(144, 144), torch.randn(144))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_that_networks_make(call: Any) -> None:
    model = net(lambda self, x: call(x.sigmoid()))
    program = capture(model, InputSpec((3, 12, 12)))
    again = from_data(to_data(program), state_of(program))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(again(x), model(x))


def test_a_wrapper_without_a_module_is_refused_by_name() -> None:
    assert allowlist.function_name(type.__dict__["__call__"]) is None
