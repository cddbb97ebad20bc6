"""Stock torch as the measure: trusted while rounding explains its error, else never silently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends
from fused_resnet._build import extension
from fused_resnet.backends.torch_ import AtenConv
from fused_resnet.judging import Judge
from fused_resnet.numerics import (
    Error,
    error,
    largest,
    reference_chain,
    reference_conv,
    stock_chain,
    stock_conv,
)
from fused_resnet.problem import EPILOGUES, AddReluProblem, ConvProblem, MaxPool
from fused_resnet.source import Source
from fused_resnet.stock import errors_of, fault_of_network, marked
from fused_resnet.warn import FusedResNetWarning
from tests.chain_cases import chain_data, chain_problem
from tests.helpers import CPU, DTYPES, Args, conv_problem, draw, short

POOL = MaxPool((3, 3), (2, 2), (1, 1))


def of_stock(p: ConvProblem, args: Args, change: Callable[[Tensor], Tensor]) -> Error:
    """Stock torch's error with its result changed, as the rule takes it."""

    def compute(conv: Callable[..., Tensor], _chain: Any) -> tuple[Tensor, ...]:
        return (conv(p, *args),)

    exact = compute(reference_conv, None)
    with torch.backends.mkldnn.flags(enabled=False):  # It crashes on some odd bf16 convolutions.
        found = errors_of((change(stock_conv(p, *args)),), exact)
    (result,) = marked(found, p, exact, compute)
    return result


def unchanged(y: Tensor) -> Tensor:
    return y


@st.composite
def problems(draw_: st.DrawFn) -> ConvProblem:
    sizes = st.integers
    groups = draw_(st.sampled_from([1, 1, 2, 5]))
    r = draw_(sizes(1, 3))
    return conv_problem(
        n=draw_(sizes(1, 2)), c=groups * draw_(sizes(1, 40)), h=draw_(sizes(3, 8)),
        w=draw_(sizes(3, 8)), k=groups * draw_(sizes(1, 9)), r=r,
        padding=(draw_(sizes(0, 1)), draw_(sizes(0, 1))), groups=groups,
        epilogue=draw_(st.sampled_from(EPILOGUES)), dtype=draw_(st.sampled_from(DTYPES)),
    )  # fmt: skip


@given(problems(), st.integers(0, 1000), st.sampled_from([0.0, 1.0, -1.0, -30.0]))
def test_stock_torch_as_it_is_is_trusted(p: ConvProblem, seed: int, shift: float) -> None:
    # With a shift of -30 ReLU leaves next to nothing of the result, and rounding is large beside.
    args = draw(p, seed)
    args = args._replace(shift=args.shift + shift * args.scale.abs())
    assert of_stock(p, args, unchanged).rounding is None


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sums_that_cancel_are_trusted(dtype: torch.dtype) -> None:
    # Of products a thousand times as large as their sum; and a residual that all but undoes it.
    p = conv_problem(n=1, c=512, k=8, r=1, padding=(0, 0), dtype=dtype, epilogue="none")
    args = draw(p)
    weight = args.weight - args.weight.double().mean(1, keepdim=True).to(dtype)
    flat = args._replace(x=args.x * 1e-3 + 1, weight=weight)
    assert of_stock(p, flat, unchanged).rounding is None
    residual = -reference_conv(p, *args).to(dtype)
    p = replace(p, epilogue="add")
    assert of_stock(p, args._replace(residual=residual), unchanged).rounding is None


def one_element(y: Tensor) -> Tensor:
    flat = y.flatten()
    flat[flat.abs().argmax()] *= -1
    return flat.view(y.shape)


def a_nan(y: Tensor) -> Tensor:
    y[0, 1, 0, 0] = torch.nan
    return y


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda y: y * 1.5,
    "zero": torch.zeros_like,
    "one_element": one_element,
    "half_of_it": lambda y: torch.cat((y[:1], y[:1])),
    "nan": a_nan,
}


@pytest.mark.parametrize("pool", [None, POOL], ids=["conv", "stem"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_stock_torch_that_is_wrong_is_no_measure(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype, pool: MaxPool | None
) -> None:
    p = conv_problem(c=64, k=32, dtype=dtype, pool=pool)
    args = draw(p)
    found = of_stock(p, args, change)
    assert found.rounding is not None
    assert found.rounding.l2 < {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-4)
    right = of_stock(p, args, unchanged)
    assert right.rounding is None
    assert right.within(found, dtype)
    assert not replace(found, rounding=None).within(found, dtype)  # As wrong as stock torch is.
    assert "wrong itself: rounding explains" in str(found)
    # The larger of two measures, one of which is none, is none.
    assert largest(right, found).rounding == found.rounding


def test_sums_and_chains() -> None:
    p = AddReluProblem((2, 4, 3, 3), torch.bfloat16, False, True)
    a, b = (torch.randn(p.shape).bfloat16() for _ in range(2))
    exact = (torch.relu(a.double() + b.double()),)
    stock = (torch.relu(a + b),)
    again = lambda _conv, _chain: stock  # noqa: E731
    assert marked(errors_of(stock, exact), p, exact, again)[0].rounding is None
    assert marked(errors_of((stock[0] + 0.1,), exact), p, exact, again)[0].rounding is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_chains(dtype: torch.dtype) -> None:
    p = chain_problem(proj=64, dtype=dtype)
    args = chain_data(p)
    exact, stock = reference_chain(p, *args), stock_chain(p, *args)
    again = lambda _conv, chain: chain(p, *args)  # noqa: E731
    assert all(e.rounding is None for e in marked(errors_of(stock, exact), p, exact, again))
    found = marked(errors_of((stock[0], stock[1] * 1.5), exact), p, exact, again)
    assert [e.rounding is None for e in found] == [True, False]


def test_twice_the_error_counts_where_stock_torch_is_right() -> None:
    stock = Error(1e-3, 1e-3)
    assert Error(2e-3, 2e-3).within(stock, torch.float32)
    assert not Error(2.1e-3, 2e-3).within(stock, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_network_without_half_of_its_digits_is_no_measure(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    assert fault_of_network(Error(3.9 * eps**0.5, 1.0), dtype) is None
    why = fault_of_network(Error(0.7 if dtype == torch.bfloat16 else 0.01, 1.0), dtype)
    assert why is not None
    assert "wrong itself" in why


# ------------------------------------------------------------------ what is said, and what is used


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock torch whose bf16 convolutions lose half of the input channels, as some have."""
    conv2d = torch.conv2d

    def wrong(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        if x.dtype == torch.bfloat16:
            weight = weight.clone()
            weight[:, : max(weight.shape[1] // 2, 1)] = 0
        return conv2d(x, weight, *rest, **named)

    monkeypatch.setattr(torch, "conv2d", wrong)
    monkeypatch.setattr(nn.functional, "conv2d", wrong)


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 24, 1), nn.ReLU(),
    ).eval()  # fmt: skip


X = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(3))


def error_of(plan: fused_resnet.Plan, model: nn.Module) -> float:
    # What the plan is given, and its weights but for the norms', are rounded to bf16 first.
    wide = copy.deepcopy(model)
    for m in wide.modules():
        if isinstance(m, nn.Conv2d):
            m.bfloat16()
    return error(plan(X), wide.double()(X.bfloat16().double())).l2


@pytest.mark.skipif(extension is None, reason="no compiled extension: only stock torch is left")
@pytest.mark.usefixtures("hurried", "tuned", "broken", "fresh_registry")
def test_optimize_says_that_stock_torch_is_wrong_and_uses_what_is_right() -> None:
    with pytest.warns(FusedResNetWarning, match="stock torch itself is wrong on 2 layers: on 0 "):
        plan = fused_resnet.optimize(network(), X, dtype=torch.bfloat16)
    (part,) = plan.explain().parts
    rows = [row for row in part.rows if row.kernel != "torch"]
    assert len(rows) == 2
    for row in rows:
        assert not row.kernel.startswith("torch/")
        assert row.stock_error is not None
        assert row.stock_error > 0.1
        (why,) = [r.why for r in row.rivals if r.kernel == "torch/aten"]
        assert "it is wrong itself: rounding explains" in why
    assert any("stock torch itself is wrong" in note for note in part.notes)
    assert error_of(plan, network()) < 1e-2


@pytest.mark.usefixtures("hurried", "tuned", "broken", "fresh_registry")
def test_a_kernel_as_wrong_as_stock_torch_fails_its_entrance_test() -> None:
    class AsWrong(AtenConv):
        backend, name = "library", "as_wrong"

    why = backends.verdict(AsWrong(), CPU, torch.bfloat16)
    assert why is not None
    assert "it is wrong itself: rounding explains" in why


@pytest.mark.usefixtures("hurried", "tuned", "broken", "fresh_registry")
def test_where_nothing_is_right_it_is_said() -> None:
    with (
        backends.backend("torch"),
        pytest.warns(FusedResNetWarning, match="0: no kernel is right, torch/aten is used"),
    ):
        plan = fused_resnet.optimize(network(), X, dtype=torch.bfloat16)
    assert error_of(plan, network()) > 0.1


@pytest.mark.usefixtures("broken", "fresh_registry")
def test_check_says_that_stock_torch_is_wrong() -> None:
    model = network()
    report = fused_resnet.check(fused_resnet.fuse(model), model, X, dtype=torch.bfloat16)
    assert not report.passed
    assert any("stock torch itself is wrong on 2 of 2 ops" in note for note in report.notes)
    assert not report.outputs[0].passed
    assert "wrong itself" in report.outputs[0].note
    right = fused_resnet.check(fused_resnet.fuse(model), model, X)
    assert right.passed


@pytest.mark.usefixtures("broken")
def test_a_network_is_not_judged_by_a_stock_torch_that_is_wrong() -> None:
    source = Source(network(), torch.bfloat16)
    why = Judge(source, (X,), {}).fault(torch.zeros(2, 24, 12, 12))
    assert why is not None
    assert "stock torch's own error" in why
