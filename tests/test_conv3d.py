"""3-d convolutions: the op, its kernels, and video models through fuse, check and optimize."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import grad as grad_of
from torch.func import jvp, vmap

import fused_resnet
from fused_resnet import FusedResNetWarning, backends, functional
from fused_resnet.backends import library
from fused_resnet.problem import EPILOGUES, Conv3dProblem
from tests.helpers import (
    CPU,
    DTYPES,
    Args,
    assert_within_rule,
    call,
    channels_last,
    conv3d_problem,
    conv_kernels,
    draw,
    randomise,
    reference,
    short,
    stock,
)
from tests.test_fuse import check as check_fused
from tests.test_fuse import sites

OP = torch.ops.fused_resnet.conv3d_affine_act

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3x3": {},
    "3x3x3_stride_2": {"c": 16, "k": 32, "stride": (2, 2, 2)},
    "1x1x1": {"kernel": (1, 1, 1), "padding": (0, 0, 0)},
    "1x1x1_stride_2": {"kernel": (1, 1, 1), "padding": (0, 0, 0), "stride": (2, 2, 2)},
    "spatial": {"kernel": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 1)},
    "temporal": {"kernel": (3, 1, 1), "padding": (1, 0, 0), "stride": (2, 1, 1)},
    "stem": {"c": 3, "kernel": (3, 7, 7), "padding": (1, 3, 3), "stride": (1, 2, 2)},
    "even_dilated": {"kernel": (2, 3, 2), "padding": (1, 2, 0), "dilation": (1, 2, 3)},
    "groups": {"c": 12, "k": 8, "groups": 4},
    "depthwise": {"c": 16, "k": 16, "groups": 16},
    "one_channel": {"c": 1, "k": 1},
    "one_pixel": {"n": 1, "size": (1, 1, 1)},
    "one_frame": {"n": 1, "size": (1, 6, 5), "kernel": (1, 3, 3), "padding": (0, 0, 0)},
    "kernel_covers_all": {"size": (2, 3, 4), "kernel": (2, 3, 4), "padding": (0, 0, 0)},
}


def check(p: Conv3dProblem, args: Args, actual: Tensor) -> None:
    """Right by the rule, and laid out as the fake implementation says."""
    assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)
    with FakeTensorMode() as mode:
        fake = call(p, Args(*(None if t is None else mode.from_tensor(t) for t in args)))
    assert tuple(fake.shape) == p.out_shape
    assert actual.stride() == fake.stride()
    assert actual.dtype == fake.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last_3d)


# ------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_epilogue(geometry: str, dtype: torch.dtype) -> None:
    for epilogue in EPILOGUES:
        p = conv3d_problem(**GEOMETRIES[geometry], epilogue=epilogue, dtype=dtype)
        args = draw(p)
        check(p, args, call(p, args))
        for kernel in conv_kernels("conv3d_affine_act"):
            if kernel.supports(p, CPU) is None:
                # The second call finds prepacked weights.
                for _ in range(2):
                    actual = kernel.run(p, *args)
                    assert_within_rule(actual, reference(p, args), stock(p, args), dtype)


def ncdhw(t: Tensor) -> Tensor:
    return t.contiguous()


def sliced(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 1]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -3).contiguous().transpose(-1, -3)


LAYOUTS = {f.__name__: f for f in (ncdhw, channels_last, sliced, transposed)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_layouts(x_layout: str, residual_layout: str, dtype: torch.dtype) -> None:
    for size in ({}, {"c": 1, "k": 1}, {"n": 1, "size": (1, 1, 1)}):
        p = conv3d_problem(**size, epilogue="add_relu", dtype=dtype)
        args = draw(p)
        assert args.residual is not None
        args = args._replace(
            x=LAYOUTS[x_layout](args.x),
            weight=LAYOUTS[residual_layout](args.weight),
            residual=LAYOUTS[residual_layout](args.residual),
        )
        before = [t.clone() for t in args]
        check(p, args, call(p, args))
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> Conv3dProblem:
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def triple(low: int, high: int) -> tuple[int, int, int]:
        return draw(st.tuples(*[st.integers(low, high)] * 3))

    p = conv3d_problem(
        draw(st.integers(0, 3)), groups * draw(st.integers(1, 5)), triple(1, 7),
        groups * draw(st.integers(1, 6)), triple(1, 3), triple(1, 3), triple(0, 2), triple(1, 2),
        groups, draw(st.sampled_from(EPILOGUES)), draw(st.sampled_from(DTYPES)),
    )  # fmt: skip
    assume(min(p.conv_size) > 0)
    return p


@given(p=problems(), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_any_shape(p: Conv3dProblem, layout: str, seed: int) -> None:
    args = draw(p, seed)
    args = args._replace(x=LAYOUTS[layout](args.x))
    check(p, args, call(p, args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_scale_and_shift_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    p = conv3d_problem(
        1, 1, (2, 4, 4), 1, (1, 1, 1), padding=(0, 0, 0), epilogue="none", dtype=dtype
    )
    x, weight = torch.ones(p.in_shape, dtype=dtype), torch.ones(p.weight_shape, dtype=dtype)
    args = Args(x, weight, torch.tensor([1 + 2.0**-12]), torch.tensor([-1.0]), None)
    assert call(p, args).unique().tolist() == [2.0**-12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_nan_and_infinity_pass_as_in_torch(epilogue: str, dtype: torch.dtype) -> None:
    p = conv3d_problem(epilogue=epilogue, dtype=dtype)
    args = draw(p)
    args = args._replace(scale=args.scale.abs() + 1)
    args.x[0, 0, 1, 4, 4], args.x[1, 1, 2, 2, 2] = float("nan"), float("inf")
    expected = stock(p, args)
    assert expected.isnan().any()
    for kernel in conv_kernels("conv3d_affine_act"):
        if kernel.supports(p, CPU) is None:
            found = kernel.run(p, *args)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf() * found.sign(), expected.isinf() * expected.sign())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        {"c": 256, "size": (2, 4, 4), "k": 256},
        {"c": 512, "size": (1, 2, 2), "k": 64, "kernel": (1, 3, 3), "padding": (0, 1, 1)},
        {"c": 512, "size": (1, 1, 1), "k": 512, "kernel": (1, 1, 1), "padding": (0, 0, 0)},
        {"c": 512, "size": (2, 7, 7), "k": 64, "kernel": (3, 1, 1), "padding": (1, 0, 0)},
        {"n": 2, "c": 256, "size": (2, 4, 4), "k": 64},
    ],
    ids=["256x3x3x3", "512x1x3x3", "512x1x1x1", "512x3x1x1", "two_videos"],
)
def test_long_sums_are_as_exact_as_stock(shape: dict[str, Any], threads: int) -> None:
    # Where ATen multiplies matrices, oneDNN's sums would be up to 5 times as far from float64.
    torch.set_num_threads(threads)
    p = conv3d_problem(**{"n": 1, **shape})
    for seed in range(3):
        args = draw(p, seed)
        args = args._replace(x=args.x.relu())
        assert_within_rule(call(p, args), reference(p, args), stock(p, args), p.dtype)


# ------------------------------------------------------------------------- choosing among kernels


def chosen(**changes: Any) -> str:
    p = conv3d_problem(**changes)
    return backends.choose("conv3d_affine_act", p, CPU).kernel.full_name


def test_the_kernel_that_is_chosen() -> None:
    assert chosen() == "library/onednn"
    assert chosen(n=1) == "library/onednn"  # Short sums.
    assert chosen(n=1, c=64) == "library/aten_folded"
    assert chosen(n=2, c=64) == "library/onednn"
    assert chosen(n=1, c=64, size=(16, 56, 56)) == "library/onednn"  # As ATen does by itself.
    assert chosen(dtype=torch.float64) == chosen(dtype=torch.float16) == "torch/aten"
    with fused_resnet.backend("torch"):
        assert chosen() == "torch/aten"
    with torch.backends.mkldnn.flags(enabled=False):
        assert chosen(n=2, c=64) == "library/aten_folded"


@pytest.mark.parametrize("epilogue", ["relu", "add_relu"])
def test_arguments_of_cudnn(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins for the ATen functions, which need a GPU; their signatures are compared with torch's
    # in test_backends.py.
    def conv_relu(x, weight, bias, stride, padding, dilation, groups):
        return nn.functional.conv3d(x, weight, bias, stride, padding, dilation, groups).relu()

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        y = nn.functional.conv3d(x, weight, bias, stride, padding, dilation, groups)
        return (y + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    geometry = {"stride": (1, 2, 1), "padding": (0, 1, 2), "dilation": (1, 1, 2), "groups": 2}
    p = conv3d_problem(kernel=(1, 3, 2), **geometry, epilogue=epilogue)
    args = draw(p)
    for _ in range(2):
        actual = library.CudnnConv3d().run(p, *args)
        assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_on_a_gpu(epilogue: str, dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    p = conv3d_problem(epilogue=epilogue, dtype=dtype)
    args = Args(*(None if t is None else t.to(cuda) for t in draw(p)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for kernel in backends.KERNELS:
            if kernel.op == "conv3d_affine_act" and kernel.supports(p, cuda) is None:
                assert backends.verdict(kernel, cuda, dtype) is None
                actual = kernel.run(p, *args)
                assert_within_rule(actual, reference(p, args), stock(p, args), dtype)


# ------------------------------------------------------------- autograd, transforms and compilers


def leaves(args: Args) -> Args:
    return Args(*(None if t is None else t.detach().clone().requires_grad_() for t in args))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradients(epilogue: str) -> None:
    p = conv3d_problem(
        2, 4, (3, 4, 4), 4, stride=(1, 2, 1), groups=2, epilogue=epilogue, dtype=torch.float64
    )
    mine, exact = leaves(draw(p)), leaves(draw(p))
    call(p, mine).square().sum().backward()
    stock(p, exact).square().sum().backward()
    for m, e in zip(mine, exact, strict=True):
        if m is not None:
            torch.testing.assert_close(m.grad, e.grad, rtol=1e-10, atol=1e-10)


def test_transforms() -> None:
    p = conv3d_problem(2, 2, (3, 4, 4), 3, dtype=torch.float64)
    args = draw(p)
    x, v = args.x + 0.1, torch.randn_like(args.x)
    op, plain = (lambda x, f=f: f(p, args._replace(x=x)) for f in (call, stock))
    for actual, wanted in zip(jvp(op, (x,), (v,)), jvp(plain, (x,), (v,)), strict=True):
        torch.testing.assert_close(actual, wanted)
    gradients = (grad_of(lambda x, f=f: f(x).square().sum())(x) for f in (op, plain))
    torch.testing.assert_close(*gradients)
    xs = torch.stack([x, v, x - v])
    torch.testing.assert_close(vmap(op)(xs), torch.stack([plain(x) for x in xs]))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_autocast(epilogue: str) -> None:
    low = conv3d_problem(epilogue=epilogue, dtype=torch.bfloat16)
    args = draw(conv3d_problem(epilogue=epilogue))
    half = Args(*(t if t is None or t.dim() == 1 else t.bfloat16() for t in args))
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(low, args)
    assert_within_rule(actual, reference(low, half), stock(low, half), torch.bfloat16)


@pytest.mark.parametrize("epilogue", ["none", "relu_add_relu"])
def test_opcheck(epilogue: str) -> None:
    p = conv3d_problem(2, 4, (3, 5, 4), 4, epilogue=epilogue)
    for args in (draw(p), leaves(draw(p)), draw(p)._replace(x=draw(p).x.contiguous())):
        torch.library.opcheck(
            OP.default, (*args, p.stride, p.padding, p.dilation, p.groups, p.epilogue)
        )


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_decomposition(epilogue: str, dtype: torch.dtype) -> None:
    part = fused_resnet.decompositions()[OP.default]
    p = conv3d_problem(epilogue=epilogue, dtype=dtype)
    args = draw(p)
    actual = part(*args, p.stride, p.padding, p.dilation, p.groups, p.epilogue)
    assert_within_rule(actual, reference(p, args), stock(p, args), dtype)


# -------------------------------------------------------------------------------------- bad input

GOOD = {
    "x": torch.randn(2, 8, 4, 9, 7),
    "weight": torch.randn(12, 8, 3, 3, 3),
    "scale": torch.ones(12),
    "shift": torch.zeros(12),
    "residual": None,
    "stride": (1, 1, 1),
    "padding": (1, 1, 1),
    "dilation": (1, 1, 1),
    "groups": 1,
    "epilogue": "relu",
}

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "image": ({"x": torch.randn(2, 8, 9, 7)}, ValueError, r"x must be \[N, C, D, H, W\].*4 dim"),
    "weight_of_image": (
        {"weight": torch.randn(12, 8, 3, 3)},
        ValueError,
        r"weight must be \[K, C / groups, T, R, S\], got 4 dim",
    ),
    "two_strides": (
        {"stride": (1, 1)},
        ValueError,
        r"stride must have 3 values \(depth, height, width\), got \[1, 1\]",
    ),
    "padding": ({"padding": (0, -1, 0)}, ValueError, r"padding must be at least 0"),
    "kernel_too_large": (
        {"dilation": (4, 1, 1)},
        ValueError,
        r"3x3x3 \(dilation \[4, 1, 1\]\) does not fit into x \[2, 8, 4, 9, 7\].* be -2x9x7",
    ),
    "no_kernel": ({"weight": torch.randn(12, 8, 0, 3, 3)}, ValueError, r"at least 1x1x1"),
    "channels": ({"groups": 2}, ValueError, r"8 channels .*groups=2 takes 16"),
    "scale_half": ({"scale": torch.ones(12).half()}, TypeError, r"scale must be torch.float32"),
    "integers": ({"x": torch.ones(2, 8, 4, 9, 7).int()}, TypeError, r"x must be float"),
    "residual_shape": (
        {"epilogue": "add", "residual": torch.randn(2, 12, 1, 9, 7)},
        ValueError,
        r"the result's shape \[2, 12, 4, 9, 7\].*\[2, 12, 1, 9, 7\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Tensor:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(backends, "run", run)
    change, exception, message = BAD[case]
    for _ in range(2):  # Nothing bad is remembered as good.
        with pytest.raises(exception, match=message):
            OP(*{**GOOD, **change}.values())


def test_the_function() -> None:
    p = conv3d_problem(kernel=(3, 2, 4), dtype=torch.float64)
    x, weight, scale, shift, _ = draw(p)
    affine = (1, -1, 1, 1, 1)
    for options in ({"padding": "same"}, {"padding": "valid"}, {"padding": 2, "stride": (1, 2, 3)}):
        z = nn.functional.conv3d(x, weight, **options)
        z = z * scale.view(affine) + shift.view(affine)
        found = functional.conv3d_affine_act(x, weight, scale, shift, **options, epilogue="none")
        torch.testing.assert_close(found, z)
    with pytest.raises(ValueError, match=r"stride must be an int or a triple \(depth, height"):
        functional.conv3d_affine_act(x, weight, scale, shift, stride=(1, 2))
    with pytest.raises(ValueError, match="padding 'same' needs stride 1"):
        functional.conv3d_affine_act(x, weight, scale, shift, stride=2, padding="same")


# ----------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A stem, and a residual block as those of torchvision's video ResNets."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(inplace=True),
        )
        self.conv1 = conv or nn.Conv3d(8, 8, 3, padding=1)
        self.bn1 = norm or nn.BatchNorm3d(8)
        self.conv2 = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(y.mean((2, 3, 4)))


X = torch.randn(2, 3, 4, 12, 10, generator=torch.Generator().manual_seed(0))
#: Fused calls of the block itself, then that of its stem.
WHOLE = ["conv bn relu", "conv bn add relu", "conv bn relu"]


def block() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Block()).eval()


def assert_right(actual: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_rule(actual, exact, model(x), x.dtype)


CONVS = {
    "bias": nn.Conv3d(8, 8, 3, padding=1),
    "same": nn.Conv3d(8, 8, (2, 3, 4), padding="same", dilation=(1, 2, 1)),
    "replicate": nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
    "circular": nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), padding_mode="circular"),
    "groups": nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=4, bias=False),
}


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_convolutions(conv: nn.Module) -> None:
    assert sites(check_fused(Block(conv), X)) == WHOLE


def test_synchronised_norm() -> None:
    fused = check_fused(Block(norm=nn.SyncBatchNorm(8)), X, train=False)
    assert sites(fused) == WHOLE


def test_other_convolutions_and_norms_stay() -> None:
    class Standardised(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv3d(x, self.weight / self.weight.norm(), None, padding=1)

    for conv, norm, reason in (
        (Standardised(8, 8, 3), None, "Standardised is not a plain nn.Conv3d"),
        (None, nn.GroupNorm(2, 8), "GroupNorm is not a batch norm"),
        (None, nn.BatchNorm3d(8, track_running_stats=False), "keeps no running statistics"),
    ):
        fused = check_fused(Block(conv, norm), X)
        assert sites(fused) == WHOLE[1:]
        rows = {row.path: row for row in fused_resnet.explain(fused).rows}
        assert reason in (rows["bn1" if conv is None else "conv1"].reason or "")


def test_norms_of_another_rank_complain_as_in_stock() -> None:
    for conv, norm, x in (
        (nn.Conv3d(3, 4, 1), nn.BatchNorm2d(4), X),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm3d(4), X[:, :, 0]),
    ):
        model = nn.Sequential(conv, norm, nn.ReLU()).eval()
        with pytest.warns(FusedResNetWarning, match="nothing to fuse"):
            fused = fused_resnet.fuse(model)
        with pytest.raises(ValueError, match=r"expected .D input"):
            fused(x)
        with pytest.raises(ValueError, match=r"expected .D input"):
            functional.conv_bn_act(x, conv, norm)


def test_what_stock_operators_forgive() -> None:
    model = check_fused(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1)), X)
    with torch.no_grad():  # A video without a batch dimension.
        x = X[0].double()
        torch.testing.assert_close(model(x), fused_resnet.unfuse(model)(x))

    class Broadcast(Block):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.relu(self.bn1(self.conv1(self.stem(x))) + r)

    for r in (torch.randn(8, 1, 1, 1), torch.randn(2, 8, 4, 6, 5)):
        check_fused(Broadcast(), X, r)


def test_pooling_of_images_behind_a_video_convolution() -> None:
    # MaxPool2d takes the video without a batch dimension that Conv3d returns.
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert sites(check_fused(model, X[0])) == ["conv relu"]
    conv, relu, pool = model.float()
    with torch.no_grad():
        found = functional.conv_bn_act_maxpool(X[0], conv, None, relu, pool)
        torch.testing.assert_close(found, pool(relu(conv(X[0]))))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_batches(n: int, dtype: torch.dtype) -> None:
    model = block().to(dtype)
    x = torch.randn(n, 3, 4, 12, 10).to(dtype)
    with torch.no_grad():
        actual = fused_resnet.fuse(model)(x)
        assert_within_rule(actual, copy.deepcopy(model).double()(x.double()), model(x), dtype)


def test_a_changed_parameter_is_seen() -> None:
    model = block()
    fused = fused_resnet.fuse(model)
    with torch.no_grad():
        fused(X)
        fused.conv1.weight.mul_(2)
        fused.bn2.running_var.mul_(3)
        assert_right(fused(X), model, X)


def test_check_and_explain_name_the_kernels() -> None:
    model = block()
    fused = fused_resnet.fuse(model)
    report = fused_resnet.check(fused, model, X)
    assert report.passed, str(report)
    assert [row.kernel for row in report.layers] == ["library/onednn"] * 3
    assert report.layers[0].problem == "conv 3x5x5/1x2x2 3->8 2x4x12x10 float32 relu"
    found = fused_resnet.explain(fused, (X,))
    assert {row.kernel for row in found.rows} == {"library/onednn"}
    half, halved = fused.bfloat16(), copy.deepcopy(model).bfloat16()
    report = fused_resnet.check(half, halved, X.bfloat16())
    assert report.passed, str(report)


def test_check_finds_a_wrong_stride() -> None:
    model, other = block(), block()
    other.stem[0].stride = (2, 2, 1)
    report = fused_resnet.check(fused_resnet.fuse(other), model, X)
    assert not report.passed


def test_compile_and_export(tmp_path: Path) -> None:
    model = block()
    fused = fused_resnet.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(fused, (X,), dynamic_shapes={"x": {0: batch}})
        names = [str(n.target) for n in program.graph.nodes if "fused_resnet" in str(n.target)]
        assert names == ["fused_resnet.conv3d_affine_act.default"] * 3
        plain = program.run_decompositions(fused_resnet.decompositions())
        assert not any("fused_resnet" in str(n.target) for n in plain.graph.nodes)
        torch.export.save(program, tmp_path / "block.pt2")
        loaded = torch.export.load(tmp_path / "block.pt2")
        for x in (X, X[:1], X.repeat(2, 1, 1, 1, 1)):
            for run in (compiled, loaded.module(), plain.module()):
                assert_right(run(x), model, x)


@pytest.mark.slow
def test_onnx_runtime_gives_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = block()
    with torch.no_grad():
        program = torch.export.export(fused_resnet.fuse(model), (X,))
    program = program.run_decompositions(fused_resnet.decompositions())
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "block.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "block.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert_right(torch.from_numpy(y), model, X)


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.usefixtures("tuned", "hurried")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_optimize(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = block().to(dtype), X.to(dtype)
    plan = fused_resnet.optimize(model, x)
    (part,) = plan.explain().parts
    convs = [row for row in part.rows if row.problem.startswith("conv")]
    assert [row.name for row in convs] == ["stem.0", "conv1", "conv2"]
    for row in convs:
        rivals = {row.kernel, *(r.kernel for r in row.rivals)}
        assert {"torch/aten", "library/onednn"} <= rivals
    assert_right(plan(x), model, x)
    plan.save(tmp_path / "plan")
    loaded = fused_resnet.load(tmp_path / "plan")
    assert torch.equal(loaded(x), plan(x))


@pytest.mark.usefixtures("tuned", "hurried")
def test_sums_of_videos_that_lie_differently() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.sigmoid(self.bn(self.conv(x))) + torch.sigmoid(x))

    model = randomise(Sum()).eval()
    plan = fused_resnet.optimize(model, X)
    for x in (X, channels_last(X)):
        assert_right(plan(x), model, x)


def test_videos_are_not_chained() -> None:
    bottleneck = nn.Sequential(
        *(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.Conv3d(4, 8, 1), nn.BatchNorm3d(8)),
    ).eval()
    assert fused_resnet.find_chains(fused_resnet.fuse(bottleneck)) == []
