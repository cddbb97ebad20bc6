"""The registered ops against float64: every epilogue, dtype, kernel, layout, and way of calling."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad as grad_of
from torch.func import jacfwd, jvp, vmap

from fused_resnet import backends, fold, functional, ops
from fused_resnet.problem import EPILOGUES, ConvProblem, MaxPool
from tests.helpers import (
    CPU,
    DTYPES,
    GEOMETRIES,
    Args,
    assert_within_rule,
    call,
    channels_last,
    conv_kernels,
    conv_problem,
    draw,
    reference,
    short,
    stock,
)

OPS = torch.ops.fused_resnet
POOL = MaxPool((3, 3), (2, 2), (1, 1))


def check(p: ConvProblem, args: Args, actual: Tensor) -> None:
    assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)
    fake = fake_result(p, args)
    assert actual.shape == fake.shape
    assert actual.stride() == fake.stride()
    assert actual.dtype == fake.dtype


def fake_result(p: ConvProblem, args: Args) -> Tensor:
    with FakeTensorMode() as mode:
        return call(p, Args(*(None if t is None else mode.from_tensor(t) for t in args)))


# ------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_epilogue_of_the_chosen_kernel(geometry: str, dtype: torch.dtype) -> None:
    for epilogue in EPILOGUES:
        p = conv_problem(**GEOMETRIES[geometry], epilogue=epilogue, dtype=dtype)
        args = draw(p)
        check(p, args, call(p, args))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kernel", conv_kernels(), ids=lambda k: k.full_name)
def test_every_epilogue_of_every_kernel(
    kernel: backends.Kernel, geometry: str, dtype: torch.dtype
) -> None:
    for epilogue in EPILOGUES:
        p = conv_problem(**GEOMETRIES[geometry], epilogue=epilogue, dtype=dtype)
        why_not = kernel.supports(p, CPU)
        if why_not is not None:
            assert dtype != torch.float32 or len(why_not) > 10
            continue
        args = draw(p)
        # The second call finds prepacked weights.
        for _ in range(2):
            actual = kernel.run(p, *args)
            assert_within_rule(actual, reference(p, args), stock(p, args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "kernel", conv_kernels("conv_affine_relu_maxpool"), ids=lambda k: k.full_name
)
def test_stem_of_every_kernel(kernel: backends.Kernel, dtype: torch.dtype) -> None:
    for size, k, pool in (
        ((2, 3, 19, 23), 16, POOL),
        ((1, 3, 32, 32), 64, POOL),
        ((1, 1, 8, 8), 3, MaxPool((2, 3), (1, 2), (1, 0))),
    ):
        n, c, h, w = size
        p = conv_problem(n, c, h, w, k, 7, None, (2, 2), (3, 3), dtype=dtype, pool=pool)
        if kernel.supports(p, CPU) is not None:
            continue
        args = draw(p)
        assert_within_rule(kernel.run(p, *args), reference(p, args), stock(p, args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_stem(dtype: torch.dtype, n: int) -> None:
    p = conv_problem(n, 3, 18, 23, 16, 7, None, (2, 2), (3, 3), dtype=dtype, pool=POOL)
    args = draw(p)
    check(p, args, call(p, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_stem_of_negative_activations(dtype: torch.dtype) -> None:
    # ReLU before pooling, and padding of the pooling that must never win over a real zero.
    p = conv_problem(1, 3, 9, 9, 4, 3, None, (1, 1), (1, 1), dtype=dtype, pool=POOL)
    args = draw(p)._replace(shift=torch.full((4,), -100.0))
    assert torch.equal(call(p, args), torch.zeros(p.out_shape, dtype=dtype))


def test_scale_and_shift_are_not_rounded_to_half_precision() -> None:
    # A scale of 1 + 2**-12 times 2**-12 is visible only where x * scale is not rounded before the
    # shift takes the bulk away.
    for dtype in (torch.float16, torch.bfloat16):
        p = conv_problem(1, 1, 4, 4, 1, 1, padding=(0, 0), epilogue="none", dtype=dtype)
        args = Args(
            torch.ones(1, 1, 4, 4, dtype=dtype),
            torch.ones(1, 1, 1, 1, dtype=dtype),
            torch.tensor([1 + 2.0**-12]),
            torch.tensor([-1.0]),
            None,
        )
        assert call(p, args).unique().tolist() == [2.0**-12]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_and_infinity_come_through(dtype: torch.dtype) -> None:
    for epilogue in EPILOGUES:
        p = conv_problem(1, 2, 5, 5, 3, 1, padding=(0, 0), epilogue=epilogue, dtype=dtype)
        args = draw(p)
        args = args._replace(scale=args.scale.abs() + 1)
        args.x[0, 0, 0, 0] = float("nan")
        args.x[0, 1, 2, 2] = float("inf")
        if args.residual is not None:
            args.residual[0, 1, 4, 4] = float("nan")
            args.residual[0, 2, 3, 3] = float("inf")
        actual, wanted = call(p, args), reference(p, args)
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert torch.equal(actual.isposinf(), wanted.isposinf())
        assert torch.equal(actual.isneginf(), wanted.isneginf())


# --------------------------------------------------------------------------------------- layouts


def sliced(t: Tensor) -> Tensor:
    big = torch.full((*t.shape[:2], t.shape[2] + 3, 2 * t.shape[3]), 9.0, dtype=t.dtype)
    view = big[:, :, 2 : 2 + t.shape[2], ::2]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def misaligned(t: Tensor) -> Tensor:
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    n, c, h, w = t.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def reversed_batch(t: Tensor) -> Tensor:
    return channels_last(t.flip(0)).permute(1, 2, 3, 0).flip(3).permute(3, 0, 1, 2)


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "sliced": sliced,
    "transposed": transposed,
    "misaligned": misaligned,
    "batch_innermost": reversed_batch,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_layouts(x_layout: str, residual_layout: str, dtype: torch.dtype) -> None:
    for size in ({}, {"c": 1, "k": 1}, {"n": 1, "h": 1, "w": 1}):
        p = conv_problem(**size, epilogue="add_relu", dtype=dtype)
        args = draw(p)
        assert args.residual is not None
        args = args._replace(
            x=LAYOUTS[x_layout](args.x), residual=LAYOUTS[residual_layout](args.residual)
        )
        before = [t.clone() for t in args]
        check(p, args, call(p, args))
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_weight_layouts(weight_layout: str) -> None:
    p = conv_problem()
    args = draw(p)
    args = args._replace(weight=LAYOUTS[weight_layout](args.weight))
    check(p, args, call(p, args))


def test_expanded_tensors() -> None:
    p = conv_problem(epilogue="add")
    args = draw(p)
    args = Args(
        args.x[:1].expand(2, -1, -1, -1),
        args.weight[:, :1].expand(-1, 8, -1, -1),
        args.scale[1:2].expand(12),
        args.shift[:1].expand(12),
        torch.randn(1, 12, 1, 1).expand(2, 12, 9, 7),
    )
    check(p, args, call(p, args))


def test_strided_vectors() -> None:
    p = conv_problem()
    args = draw(p)
    scale, shift = torch.stack([args.scale, args.shift], 1).unbind(1)
    assert not scale.is_contiguous()
    check(p, args, call(p, args._replace(scale=scale, shift=shift)))


def test_x_is_the_residual() -> None:
    p = conv_problem(c=8, k=8, epilogue="add_relu")
    args = draw(p)
    args = args._replace(residual=args.x)
    check(p, args, call(p, args))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_batch(epilogue: str, dtype: torch.dtype) -> None:
    p = conv_problem(0, epilogue=epilogue, dtype=dtype)
    args = draw(p)
    check(p, args, call(p, args))


def test_result_is_fresh_memory() -> None:
    p = conv_problem(epilogue="add")
    args = draw(p)
    result = call(p, args)
    assert result._base is None
    pointers = {t.untyped_storage().data_ptr() for t in args if t is not None}
    assert result.untyped_storage().data_ptr() not in pointers


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    extent, pair = st.integers(1, 9), lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
    p = conv_problem(
        draw(st.integers(0, 3)), groups * draw(st.integers(1, 5)), draw(extent), draw(extent),
        groups * draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4)),
        draw(pair(1, 3)), draw(pair(0, 3)), draw(pair(1, 3)), groups,
        draw(st.sampled_from(EPILOGUES)), draw(st.sampled_from(DTYPES)),
    )  # fmt: skip
    assume(min(p.conv_size) > 0)
    return p


@given(p=problems(), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_any_shape(p: ConvProblem, layout: str, seed: int) -> None:
    args = draw(p, seed)
    args = args._replace(x=LAYOUTS[layout](args.x))
    check(p, args, call(p, args))


# -------------------------------------------------------------------------------------- add_relu


def permuted(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() else t


ADD_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "permuted": permuted,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("a_layout", ADD_LAYOUTS)
@pytest.mark.parametrize("b_layout", ADD_LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (1, 5), (2, 3, 4), (2, 3, 4, 5), (1, 3, 1, 1)])
def test_add_relu(shape: tuple[int, ...], a_layout: str, b_layout: str, dtype: torch.dtype) -> None:
    a = ADD_LAYOUTS[a_layout](torch.randn(shape).to(dtype))
    b = ADD_LAYOUTS[b_layout](torch.randn(shape).to(dtype))
    wanted = (a.double() + b.double()).relu()
    for name in backends.NAMES:
        with FakeTensorMode() as mode:
            fake = OPS.add_relu(mode.from_tensor(a), mode.from_tensor(b))
        actual = OPS.add_relu(a, b) if name != "torch" else forced("torch", a, b)
        assert_within_rule(actual, wanted, (a + b).relu(), dtype)
        if a.numel():  # torch.empty_like itself lays out empty strided tensors otherwise when fake
            assert actual.stride() == fake.stride()


def forced(name: str, a: Tensor, b: Tensor) -> Tensor:
    with backends.backend(name):
        return OPS.add_relu(a, b)


@pytest.mark.parametrize("name", ["default", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_add_relu_in_place(dtype: torch.dtype, name: str) -> None:
    for layout in ("contiguous", "permuted", "strided"):
        a, b = ADD_LAYOUTS[layout](torch.randn(2, 3, 5).to(dtype)), torch.randn(2, 3, 5).to(dtype)
        wanted, version = (a.double() + b.double()).relu(), a._version
        expected = (a + b).relu()
        if name == "torch":
            with backends.backend("torch"):
                result = functional.add_relu(a, b, inplace=True)
        else:
            result = functional.add_relu(a, b, inplace=True)
        assert result is a
        assert a._version > version
        assert_within_rule(a, wanted, expected, dtype)


def test_add_relu_in_place_with_itself() -> None:
    a = torch.randn(4, 33)
    wanted = (a + a).relu()
    functional.add_relu(a, a, inplace=True)
    assert torch.equal(a, wanted)


@pytest.mark.parametrize("shift", [-1, 1])
def test_add_relu_in_place_never_reads_what_it_wrote(shift: int) -> None:
    buffer = torch.randn(100_001)
    a, b = (buffer[1:], buffer[:-1]) if shift < 0 else (buffer[:-1], buffer[1:])
    wanted = (a + b).relu()
    functional.add_relu(a, b, inplace=True)
    assert torch.equal(a, wanted)


def test_add_relu_in_place_on_expanded_memory_is_refused() -> None:
    a = torch.zeros(1, 4).expand(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        functional.add_relu(a, torch.ones(3, 4), inplace=True)


# ------------------------------------------------------------------------------------- gradients


def leaves(args: Args, wanted: tuple[bool, ...] = (True,) * 5) -> Args:
    return Args(
        *(
            None if t is None else t.detach().clone().requires_grad_(w)
            for t, w in zip(args, wanted, strict=True)
        )
    )


def away_from_kinks(p: ConvProblem) -> Args:
    """Tensors for which no ReLU's argument is so close to 0 that finite differences straddle it."""
    for seed in range(200):
        args = draw(p, seed)
        z = stock(conv_problem(**{**vars_of(p), "epilogue": "none"}), args)
        margins = [z.abs().min()]
        if args.residual is not None:
            margins += [(z + args.residual).abs().min(), (z.relu() + args.residual).abs().min()]
        if min(margins) > 1e-4:
            return args
    raise AssertionError("no seed keeps away from the kinks")


def vars_of(p: ConvProblem) -> dict[str, Any]:
    return {name: getattr(p, name) for name in p.__dataclass_fields__}


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    "geometry",
    [{}, {"groups": 2, "stride": (2, 1)}, {"dilation": (1, 2), "r": 2, "s": 3}],
    ids=["3x3", "groups_stride", "dilation"],
)
def test_gradcheck(epilogue: str, geometry: dict[str, Any]) -> None:
    p = conv_problem(
        **{"n": 2, "c": 2, "h": 4, "w": 4, "k": 2, **geometry},
        epilogue=epilogue,
        dtype=torch.float64,
    )
    args = leaves(away_from_kinks(p))
    given = tuple(t for t in args if t is not None)

    def op(*tensors: Tensor) -> Tensor:
        return call(p, Args(*tensors, *(None,) * (5 - len(tensors))))

    assert torch.autograd.gradcheck(op, given)
    assert torch.autograd.gradgradcheck(op, given)


def test_gradcheck_of_the_stem() -> None:
    pool = MaxPool((2, 2), (2, 2), (0, 0))
    p = conv_problem(1, 2, 6, 6, 2, 3, dtype=torch.float64, pool=pool)
    args = leaves(draw(p))

    def op(*tensors: Tensor) -> Tensor:
        return call(p, Args(*tensors, None))

    assert torch.autograd.gradcheck(op, args[:4])
    assert torch.autograd.gradgradcheck(op, args[:4])


def test_gradcheck_of_add_relu() -> None:
    a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OPS.add_relu, (a, b))
    assert torch.autograd.gradgradcheck(OPS.add_relu, (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradients_of_lower_precision(epilogue: str, dtype: torch.dtype) -> None:
    p = conv_problem(c=16, k=16, epilogue=epilogue, dtype=dtype)
    args = draw(p)
    seed_grad = torch.randn(p.out_shape).to(dtype)
    wide = leaves(Args(*(None if t is None else t.double() for t in args)))
    # One ReLU decides alike in all: rounding must not flip it, or gradients differ by whole terms.
    fused, plain = leaves(args), leaves(args)
    result, plain_result = call(p, fused), stock(p, plain)
    wide_result = stock(p, wide, torch.float64)
    agree = ((result > 0) == (wide_result > 0)) & ((plain_result > 0) == (wide_result > 0))
    if epilogue == "relu_add_relu":
        z = stock(conv_problem(**{**vars_of(p), "epilogue": "none"}), args, torch.float64)
        agree &= z.abs() > 0.05
    seed_grad = seed_grad * agree
    result.backward(seed_grad)
    plain_result.backward(seed_grad)
    wide_result.backward(seed_grad.double())
    for mine, theirs, exact in zip(fused, plain, wide, strict=True):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype
            assert_within_rule(mine.grad, exact.grad, theirs.grad, mine.dtype)


@pytest.mark.parametrize("wanted", range(1, 32))
def test_mixed_requires_grad(wanted: int) -> None:
    mask = tuple(bool(wanted & 1 << i) for i in range(5))
    p = conv_problem(n=1, c=2, h=4, w=4, k=3, epilogue="relu_add_relu", dtype=torch.float64)
    args = leaves(draw(p), mask)
    exact = leaves(draw(p), mask)
    call(p, args).square().sum().backward()
    stock(p, exact).square().sum().backward()
    for t, e in zip(args, exact, strict=True):
        assert (t.grad is None) == (e.grad is None)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, e.grad, rtol=1e-9, atol=1e-9)


def test_second_use_of_a_residual_sees_its_value() -> None:
    # An op that wrote its result into the residual would spoil what others read.
    p = conv_problem(c=4, k=4, epilogue="add_relu")
    args = draw(p)
    kept = args.residual.clone()
    call(p, args)
    assert torch.equal(args.residual, kept)


def test_in_place_op_refuses_gradients() -> None:
    a, b = torch.randn(5, requires_grad=True) * 1, torch.randn(5)
    with pytest.raises(RuntimeError, match="has no gradient"):
        OPS.add_relu_(a, b)
    with torch.no_grad():
        OPS.add_relu_(a, b)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", [*EPILOGUES, "stem", "add"])
def test_forward_mode_and_function_transforms(name: str, gradients: bool) -> None:
    """Of the ops themselves, called directly, in every way that torch has."""
    pool = POOL if name == "stem" else None
    epilogue = name if name in EPILOGUES else "relu"
    p = conv_problem(2, 3, 8, 8, 4, 3, dtype=torch.float64, epilogue=epilogue, pool=pool)
    args = draw(p)
    v = torch.randn_like(args.x)

    def op(x: Tensor) -> Tensor:
        return OPS.add_relu(x, args.x) if name == "add" else call(p, args._replace(x=x))

    def plain(x: Tensor) -> Tensor:
        return torch.relu(x + args.x) if name == "add" else reference(p, args._replace(x=x))

    x = args.x + 0.1
    with torch.set_grad_enabled(gradients):
        for actual, wanted in zip(jvp(op, (x,), (v,)), jvp(plain, (x,), (v,)), strict=True):
            torch.testing.assert_close(actual, wanted)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            found, wanted = (forward_ad.unpack_dual(f(dual)).tangent for f in (op, plain))
            torch.testing.assert_close(found, wanted)
        for transform in (lambda f: grad_of(lambda x: f(x).square().sum()), jacfwd):
            torch.testing.assert_close(transform(op)(x), transform(plain)(x))
        vs = torch.stack([v, 2 * v])
        found, wanted = (vmap(lambda v, f=f: jvp(f, (x,), (v,))[1])(vs) for f in (op, plain))
        torch.testing.assert_close(found, wanted)


def test_ops_without_derivatives_refuse_forward_mode() -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="add_relu_ has no forward-mode derivative"):
        jvp(lambda a: OPS.add_relu_(a * 1, b) or a, (a,), (a,))
    p = conv_problem(1, 64, 4, 4, 64, 3)
    conv = (draw(p).weight, torch.ones(64), torch.zeros(64))
    wide = (torch.randn(256, 64, 1, 1), torch.ones(256), torch.zeros(256))
    x = torch.randn(1, 64, 4, 4)
    with pytest.raises(RuntimeError, match="bottleneck_chain has no forward-mode derivative"):
        jvp(
            lambda x: functional.bottleneck_chain(x, torch.zeros(1, 256, 4, 4), conv, wide)[0],
            (x,),
            (x,),
        )


@pytest.mark.parametrize("backend", ["default", "torch"])
def test_in_place_edit_is_seen_by_autograd(backend: str) -> None:
    leaf = torch.randn(5, requires_grad=True)
    a = leaf.exp()  # saves its result for backward
    with torch.no_grad():
        if backend == "torch":
            with backends.backend("torch"):
                OPS.add_relu_(a, torch.ones(5))
        else:
            OPS.add_relu_(a, torch.ones(5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


def test_functional_in_place_keeps_gradients() -> None:
    leaf, b = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5).double()
    a = leaf * 2
    functional.add_relu(a, b, inplace=True).square().sum().backward()
    copy = leaf.detach().clone().requires_grad_()
    (copy * 2 + b).relu().square().sum().backward()
    assert torch.equal(leaf.grad, copy.grad)


def test_vmap() -> None:
    p = conv_problem(n=1, c=2, h=4, w=4, k=3, dtype=torch.float64)
    args = draw(p)

    def loss(weight: Tensor) -> Tensor:
        return call(p, args._replace(weight=weight)).square().sum()

    def stock_loss(weight: Tensor) -> Tensor:
        return stock(p, args._replace(weight=weight)).square().sum()

    weights = torch.randn(3, *args.weight.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(loss)(weights),
                               torch.stack([stock_loss(w) for w in weights]))  # fmt: skip


def test_modes() -> None:
    p = conv_problem(epilogue="add_relu")
    args = leaves(draw(p))
    with torch.no_grad():
        assert not call(p, args).requires_grad
    with torch.inference_mode():
        inferred = call(p, args)
        again = call(p, draw(p))
    assert inferred.is_inference()
    plain = draw(p)
    check(p, plain, again)
    assert call(p, args).requires_grad
    # What inference mode computed and cached serves autograd afterwards.
    call(p, args).sum().backward()
    assert args.weight.grad is not None


def test_inference_tensors() -> None:
    p = conv_problem(epilogue="add_relu")
    with torch.inference_mode():
        args = draw(p)
        first = call(p, args)
        args.weight.mul_(2)
        args.scale.add_(1)
        second = call(p, args)
        assert not torch.equal(first, second)
        assert_within_rule(second, reference(p, args), stock(p, args), p.dtype)


# -------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_autocast(epilogue: str, dtype: torch.dtype) -> None:
    p = conv_problem(epilogue=epilogue)
    low = conv_problem(epilogue=epilogue, dtype=dtype)
    args = draw(p)
    half = Args(*(t if t is None or t.dim() == 1 else t.to(dtype) for t in args))
    with torch.autocast("cpu", dtype):
        actual = call(p, args)
        # Vectors that someone rounded are taken, and used as fp32.
        rounded = call(p, args._replace(scale=args.scale.to(dtype)))
    assert actual.dtype == dtype
    assert_within_rule(actual, reference(low, half), stock(low, half), dtype)
    half = half._replace(scale=args.scale.to(dtype).float())
    assert_within_rule(rounded, reference(low, half), stock(low, half), dtype)


def test_autocast_keeps_scale_and_shift_fp32() -> None:
    p = conv_problem(1, 1, 4, 4, 1, 1, padding=(0, 0), epilogue="none")
    args = Args(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), torch.tensor([1 + 2.0**-12]),
                torch.tensor([-1.0]), None)  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert call(p, args).unique().tolist() == [2.0**-12]


def test_autocast_gradients_have_the_parameters_dtype() -> None:
    p = conv_problem(epilogue="add_relu")
    args = leaves(draw(p))
    with torch.autocast("cpu", torch.bfloat16):
        call(p, args).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in args)


@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast_add_relu_is_as_wide_as_stock(b_dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5).to(b_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, actual = torch.relu(a + b), OPS.add_relu(a, b)
    assert actual.dtype == wanted.dtype == torch.float32
    assert torch.equal(actual, wanted)


def test_autocast_stem() -> None:
    p = conv_problem(1, 3, 18, 22, 8, 7, None, (2, 2), (3, 3), pool=POOL)
    low = conv_problem(1, 3, 18, 22, 8, 7, None, (2, 2), (3, 3), pool=POOL, dtype=torch.bfloat16)
    args = draw(p)
    half = args._replace(x=args.x.bfloat16(), weight=args.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(p, args)
    assert_within_rule(actual, reference(low, half), stock(low, half), torch.bfloat16)


# ---------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("epilogue", ["none", "add_relu", "relu_add_relu"])
def test_opcheck_conv(epilogue: str) -> None:
    p = conv_problem(epilogue=epilogue, n=2, c=4, k=4)
    for args in (draw(p), leaves(draw(p)), draw(p)._replace(x=draw(p).x.contiguous())):
        torch.library.opcheck(
            OPS.conv_affine_act.default,
            (*args, p.stride, p.padding, p.dilation, p.groups, p.epilogue),
        )


def test_opcheck_stem_and_add() -> None:
    p = conv_problem(1, 3, 12, 14, 4, 7, None, (2, 2), (3, 3), pool=POOL)
    for args in (draw(p), leaves(draw(p))):
        torch.library.opcheck(
            OPS.conv_affine_relu_maxpool.default,
            (*args[:4], p.stride, p.padding, p.dilation, 1, (3, 3), (2, 2), (1, 1)),
        )
    for grad in (False, True):
        a, b = torch.randn(2, 3, 4, requires_grad=grad), torch.randn(2, 3, 4)
        torch.library.opcheck(OPS.add_relu.default, (a, b))
    torch.library.opcheck(OPS.add_relu.default, (torch.randn(4, 3).t(), torch.randn(3, 4)))
    torch.library.opcheck(OPS.add_relu_.default, (torch.randn(2, 3), torch.randn(2, 3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    p = conv_problem(epilogue="add_relu", c=8, k=8)

    def f(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = functional.conv_affine_act(x, weight, scale, shift, x, padding=1, epilogue="add_relu")
        z = functional.add_relu(y * 2, x)
        return functional.conv_affine_relu_maxpool(z, weight, scale, shift)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, h, w in ((2, 19, 17), (3, 19, 17), (4, 13, 11), (1, 19, 17)):
        args = draw(conv_problem(n, 8, h, w, 8))
        actual, eager = compiled(*args[:4]), f(*args[:4])
        assert actual.stride() == eager.stride()
        exact = f(*(t.double() for t in args[:4]))
        assert_within_rule(actual, exact, eager, p.dtype)


@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_strides_under_dynamic_shapes(x_layout: str) -> None:
    # The graph is made once; the strides it promised must hold for every size that comes.
    p = conv_problem(c=4, k=6, epilogue="none")
    args = draw(p)
    seen: list[tuple[int, ...]] = []

    def f(x: Tensor) -> Tensor:
        y = call(conv_problem(c=4, k=6, epilogue="none"), args._replace(x=x))
        return y.as_strided(y.shape, y.stride())

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((2, 9, 7), (3, 5, 8), (5, 6, 6)):
        x = LAYOUTS[x_layout](draw(conv_problem(n, 4, h, w, 6)).x)
        actual = compiled(x)
        assert actual.stride() == f(x).stride()
        assert torch.equal(actual, f(x))
        seen.append(actual.stride())
    assert len(set(seen)) == 3


def test_compiled_training_step_matches_eager() -> None:
    p = conv_problem(c=4, k=4, epilogue="relu_add_relu", dtype=torch.float64)
    torch._dynamo.reset()
    mine, exact = leaves(draw(p)), leaves(draw(p))
    torch.compile(lambda *a: call(p, Args(*a)), fullgraph=True, backend="aot_eager")(
        *mine
    ).square().sum().backward()
    stock(p, exact).square().sum().backward()
    for m, e in zip(mine, exact, strict=True):
        torch.testing.assert_close(m.grad, e.grad, rtol=1e-9, atol=1e-9)


class Chain(nn.Module):
    """One convolution behind several batch norms, or several: graphs whose buffers are reused."""

    def __init__(self, shared: bool, count: int = 4) -> None:
        super().__init__()
        convs = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(count)]
        self.convs = nn.ModuleList([convs[0]] * count if shared else convs)
        self.scales = nn.ParameterList(torch.rand(16) + 0.5 for _ in range(count))
        self.shifts = nn.ParameterList(torch.randn(16) for _ in range(count))

    def forward(self, x: Tensor, fused: bool = True) -> Tensor:
        for conv, scale, shift in zip(self.convs, self.scales, self.shifts, strict=True):
            # Depends on x, so that scale and shift are intermediate results of the graph.
            nothing = x.float().mean() * 0
            scale, shift = scale + nothing, shift + nothing
            if fused:
                x = functional.conv_affine_act(x, conv.weight, scale, shift, padding=1)
            else:
                x = (conv(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu()
        return x


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_reused_buffers_of_compiled_code_are_not_taken_for_known_weights(
    shared: bool, autocast: bool
) -> None:
    # Inductor writes one layer's weights, scale and shift over another's, in the same tensors and
    # without moving a version counter.
    torch._dynamo.reset()
    model, x = Chain(shared), torch.randn(2, 16, 12, 12)
    exact = Chain(shared).double()
    exact.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        wanted = exact(x.double(), fused=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = model(x, fused=False)
            for _ in range(2):
                dtype = torch.bfloat16 if autocast else torch.float32
                assert_within_rule(compiled(x), wanted, expected, dtype)


def test_export_with_dynamic_batch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            args = draw(conv_problem(c=4, k=4))
            self.weight = nn.Parameter(args.weight)
            self.register_buffer("scale", args.scale)
            self.register_buffer("shift", args.shift)

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv_affine_act(
                x, self.weight, self.scale, self.shift, x, padding=1, epilogue="add_relu"
            )

    block = Block().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (torch.randn(2, 4, 9, 7),), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["fused_resnet.conv_affine_act.default"]
    for n in (1, 2, 7):
        x = torch.randn(n, 4, 9, 7)
        assert torch.equal(program.module()(x), block(x))


def test_meta_tensors() -> None:
    p = conv_problem(epilogue="add_relu")
    args = Args(*(None if t is None else t.to("meta") for t in draw(p)))
    result = call(p, args)
    assert result.device.type == "meta"
    assert tuple(result.shape) == p.out_shape
    assert result.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- bad input

GOOD = {
    "x": torch.randn(2, 8, 9, 7),
    "weight": torch.randn(12, 8, 3, 3),
    "scale": torch.ones(12),
    "shift": torch.zeros(12),
    "residual": None,
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "epilogue": "relu",
}
RESIDUAL = torch.randn(2, 12, 9, 7)

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_rank": ({"x": torch.randn(8, 9, 7)}, ValueError, r"\[N, C, H, W\].*3 dim"),
    "x_dtype_int": ({"x": torch.ones(2, 8, 9, 7).int()}, TypeError, r"x must be float.*int32"),
    "x_complex": ({"x": torch.ones(2, 8, 9, 7) * 1j}, TypeError, r"x must be float.*complex64"),
    "x_float8": (
        {"x": torch.ones(2, 8, 9, 7).to(torch.float8_e4m3fn)},
        TypeError,
        r"x must be float.*float8",
    ),
    "weight_dtype": (
        {"weight": torch.randn(12, 8, 3, 3).half()},
        TypeError,
        r"weight must have the dtype of x, torch.float32.*float16",
    ),
    "weight_rank": ({"weight": torch.randn(12, 8, 3)}, ValueError, r"weight must be .*3 dim"),
    "channels": ({"weight": torch.randn(12, 4, 3, 3)}, ValueError, r"8 channels .* takes 4"),
    "groups": ({"groups": 2}, ValueError, r"8 channels .*groups=2 takes 16"),
    "groups_do_not_divide": (
        {"weight": torch.randn(9, 4, 3, 3), "groups": 2, "scale": torch.ones(9),
         "shift": torch.ones(9)},
        ValueError,
        r"9 output channels .*groups=2",
    ),
    "groups_zero": ({"groups": 0}, ValueError, r"groups must be at least 1, got 0"),
    "groups_negative": ({"groups": -8}, ValueError, r"groups must be at least 1, got -8"),
    "stride_zero": ({"stride": (0, 1)}, ValueError, r"stride must be at least 1, got \[0, 1\]"),
    "padding_negative": ({"padding": (1, -1)}, ValueError, r"padding must be .*\[1, -1\]"),
    "dilation_zero": ({"dilation": (1, 0)}, ValueError, r"dilation must be at least 1"),
    "three_strides": ({"stride": (1, 1, 1)}, ValueError, r"stride must have 2 values.*1, 1, 1"),
    "no_strides": ({"stride": ()}, ValueError, r"stride must have 2 values.*\[\]"),
    "kernel_too_large": (
        {"padding": (0, 0), "dilation": (5, 1)},
        ValueError,
        r"3x3 \(dilation \[5, 1\]\) does not fit into x \[2, 8, 9, 7\]",
    ),
    "no_image": ({"x": torch.ones(2, 8, 0, 7), "padding": (0, 0)}, ValueError, r"does not fit"),
    "scale_length": ({"scale": torch.ones(8)}, ValueError, r"scale must be \[12\].*\[8\]"),
    "scale_rank": ({"scale": torch.ones(12, 1)}, ValueError, r"scale must be \[12\].*\[12, 1\]"),
    "scale_half": ({"scale": torch.ones(12).half()}, TypeError, r"scale must be torch.float32"),
    "shift_double": ({"shift": torch.ones(12).double()}, TypeError, r"shift must be torch.float32"),
    "shift_length": ({"shift": torch.ones(13)}, ValueError, r"shift must be \[12\].*\[13\]"),
    "unknown_epilogue": (
        {"epilogue": "gelu"},
        ValueError,
        r"unknown epilogue 'gelu'; one of none, relu, add",
    ),
    "residual_missing": ({"epilogue": "add"}, ValueError, r"'add' needs a residual, got None"),
    "residual_unused": ({"residual": RESIDUAL}, ValueError, r"'relu' takes no residual"),
    "residual_shape": (
        {"epilogue": "add", "residual": RESIDUAL[:, :, :1, :1]},
        ValueError,
        r"residual must have the result's shape \[2, 12, 9, 7\].*\[2, 12, 1, 1\]",
    ),
    "residual_dtype": (
        {"epilogue": "add", "residual": RESIDUAL.bfloat16()},
        TypeError,
        r"residual must have the dtype of x, torch.float32.*bfloat16",
    ),
    "weight_meta": (
        {"weight": torch.randn(12, 8, 3, 3, device="meta")},
        ValueError,
        r"weight must be on the device of x, cpu; got .*meta",
    ),
    "scale_meta": (
        {"scale": torch.ones(12, device="meta")},
        ValueError,
        r"scale must be on the device of x, cpu",
    ),
    "residual_meta": (
        {"epilogue": "add", "residual": RESIDUAL.to("meta")},
        ValueError,
        r"residual must be on the device of x, cpu",
    ),
    "x_sparse": ({"x": torch.randn(2, 8, 9, 7).to_sparse()}, TypeError, r"x must be a dense"),
    "weight_sparse": (
        {"weight": torch.randn(12, 8, 3, 3).to_sparse()},
        TypeError,
        r"weight must be a dense",
    ),
    "scale_sparse": ({"scale": torch.ones(12).to_sparse()}, TypeError, r"scale must be a dense"),
    "residual_sparse": (
        {"epilogue": "add", "residual": RESIDUAL.to_sparse()},
        TypeError,
        r"residual must be a dense",
    ),
}  # fmt: skip
if torch.backends.mkldnn.is_available():
    BAD["x_mkldnn"] = ({"x": GOOD["x"].to_mkldnn()}, TypeError, r"x must be a dense")
    BAD["residual_mkldnn"] = (
        {"epilogue": "add", "residual": RESIDUAL.to_mkldnn()},
        TypeError,
        r"residual must be a dense",
    )


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Tensor:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(backends, "run", run)


@pytest.mark.usefixtures("no_kernel_runs")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, exception, message = BAD[case]
    arguments = {**GOOD, **change}
    with pytest.raises(exception, match=message):
        OPS.conv_affine_act(*arguments.values())
    # A second time too: nothing bad is remembered as good.
    with pytest.raises(exception, match=message):
        OPS.conv_affine_act(*arguments.values())


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_condemns_no_kernel(case: str) -> None:
    change, exception, _ = BAD[case]
    with pytest.raises(exception):
        OPS.conv_affine_act(*{**GOOD, **change}.values())
    assert not backends._verdicts


@pytest.mark.usefixtures("no_kernel_runs")
@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (((3, 3), (2, 2), (2, 2)), "at most half of pool_kernel"),
        (((0, 3), (2, 2), (0, 0)), "pool_kernel must be at least 1"),
        (((3, 3), (0, 2), (1, 1)), "pool_stride must be at least 1"),
        (((3, 3), (2, 2), (-1, 0)), "pool_padding must be at least 0"),
        (((30, 30), (2, 2), (0, 0)), "does not fit"),
    ],
)
def test_bad_pool(pool: tuple[Any, ...], message: str) -> None:
    good = [GOOD[name] for name in ("x", "weight", "scale", "shift")]
    with pytest.raises(ValueError, match=message):
        OPS.conv_affine_relu_maxpool(*good, (1, 1), (1, 1), (1, 1), 1, *pool)


ADD_BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.ones(4, 3), ValueError, r"one shape, got \[3, 4\] and \[4, 3\]"),
    "broadcast": (torch.ones(1, 4), ValueError, r"one shape, got \[3, 4\] and \[1, 4\]"),
    "dtype": (torch.ones(3, 4).half(), TypeError, r"b must have the dtype of a"),
    "meta": (torch.ones(3, 4, device="meta"), ValueError, r"b must be on the device of a"),
    "sparse": (torch.ones(3, 4).to_sparse(), TypeError, r"b must be a dense"),
}


@pytest.mark.usefixtures("no_kernel_runs")
@pytest.mark.parametrize("case", ADD_BAD)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_add_relu(case: str, inplace: bool, grad: bool) -> None:
    b, exception, message = ADD_BAD[case]
    a = torch.ones(3, 4, requires_grad=grad) * 1
    with pytest.raises(exception, match=message):
        functional.add_relu(a, b, inplace=inplace)


@pytest.mark.usefixtures("no_kernel_runs")
def test_add_relu_of_integers() -> None:
    with pytest.raises(TypeError, match=r"a must be float32.*int64"):
        functional.add_relu(torch.ones(3).long(), torch.ones(3).long())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autocast_packs_a_weight_once_and_notices_edits(mode) -> None:
    """The weight in the autocast dtype is kept while it holds, and made anew when it does not."""
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False).eval()
    bn = torch.nn.BatchNorm2d(8).eval()
    x = torch.randn(2, 8, 9, 9)
    packs = []

    def call() -> Tensor:
        with mode(), torch.autocast("cpu", torch.bfloat16), backends.observe() as choices:
            y = functional.conv_bn_act(x, conv, bn)
        packs.append(choices[0].kernel.packed(choices[0].problem, ops._casts[conv.weight][1], *v))
        return y

    with torch.no_grad():
        v = fold.affine_of(conv, bn)
        first = call()
        assert first.dtype == torch.bfloat16
        assert torch.equal(call(), first)
        assert packs[0] is packs[1]
        conv.weight.mul_(2.0)
        torch.testing.assert_close(call(), first * 2)
