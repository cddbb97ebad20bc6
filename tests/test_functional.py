"""The functional layer: what of stock modules it takes, and that it computes what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import backends, functional
from fused_resnet.functional import conv_bn_act, conv_bn_act_maxpool, why_not_poolable, why_stock
from tests.helpers import assert_within_rule

RELU = nn.ReLU()


def norm(k: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(k).eval()
    with torch.no_grad():
        bn.weight.uniform_(-2, 2)
        bn.bias.uniform_(-1, 1)
        bn.running_mean.uniform_(-1, 1)
        bn.running_var.uniform_(0.2, 3)
    return bn


def stock(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | None, r: Tensor | None
) -> Tensor:
    z = conv(x) if bn is None else bn(conv(x))
    z = z if r is None else z + r
    return z if act is None else act(z)


def check(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None = RELU,
    residual: Tensor | None = None,
    fused: bool = True,
) -> None:
    """The result is that of the stock modules, and comes from the one op iff ``fused``."""
    wide = [copy.deepcopy(m).double() if m is not None else None for m in (conv, bn, act)]
    with torch.no_grad():
        exact = stock(x.double(), *wide, None if residual is None else residual.double())
        expected = stock(x, conv, bn, act, residual)
        with backends.observe() as choices:
            actual = conv_bn_act(x, conv, bn, act, residual)
    assert len(choices) == int(fused)
    assert_within_rule(actual, exact, expected, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 0, 2, (1, 2)], ids=str)
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 1), ((4, 3), (1, 2)), (1, 1)])
def test_paddings(kernel: Any, dilation: Any, padding: Any, mode: str, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 6, kernel, 1, padding, dilation, padding_mode=mode).eval().to(dtype)
    x = torch.randn(2, 4, 9, 8).to(dtype)
    check(x, conv, norm(6).to(dtype))
    check(x.contiguous(memory_format=torch.channels_last), conv, None)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_strided_dilated_grouped(mode: str) -> None:
    conv = nn.Conv2d(8, 12, (3, 2), (2, 1), (2, 1), (1, 2), 4, padding_mode=mode).eval()
    check(torch.randn(2, 8, 11, 9), conv, norm(12))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((2, 4), (3, 1)), ((1, 5), 2)])
def test_string_padding_of_the_tensor_function(
    padding: str, kernel: tuple[int, int], dilation: Any
) -> None:
    x, weight = torch.randn(2, 4, 13, 12), torch.randn(5, 4, *kernel) / 4
    ones, zeros = torch.ones(5), torch.zeros(5)
    actual = functional.conv_affine_act(
        x, weight, ones, zeros, padding=padding, dilation=dilation, epilogue="none"
    )
    exact = nn.functional.conv2d(x.double(), weight.double(), None, 1, padding, dilation)
    expected = nn.functional.conv2d(x, weight, None, 1, padding, dilation)
    assert_within_rule(actual, exact, expected, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "full"}, "padding must be a size, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \(2, 2\)"),
        ({"stride": (1, 2, 3)}, r"stride must be an int or a pair .*got \(1, 2, 3\)"),
        ({"dilation": None}, "dilation must be an int or a pair .*got None"),
        ({"padding": 1.5}, "padding must be an int or a pair .*got 1.5"),
        ({"stride": (1, 1.5)}, r"stride must be an int or a pair .*got \(1, 1.5\)"),
        ({"stride": "12"}, "stride must be an int or a pair .*got '12'"),
        ({"padding": "same", "weight": torch.ones(4, 4, 3)}, r"weight must be \[K, C / groups"),
        ({"padding": "same", "weight": torch.ones(4, 4, 2, 2), "x": torch.ones(4, 5, 5)},
         r"x must be \[N, C, H, W\]"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    good = {"x": torch.ones(1, 4, 5, 5), "weight": torch.ones(4, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        functional.conv_affine_act(
            **{**good, **arguments}, scale=torch.ones(4), shift=torch.zeros(4)
        )


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.ReLU6()])
@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_activations(act: nn.Module | None, bn: bool, add: bool) -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1).eval(), torch.randn(2, 4, 7, 5)
    check(x, conv, norm(6) if bn else None, act, torch.randn(2, 6, 7, 5) if add else None)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), None])
def test_activation_before_the_addition(act: nn.Module | None) -> None:
    conv, bn = nn.Conv2d(4, 6, 3, padding=1).eval(), norm(6)
    x, r = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        y = bn(conv(x))
        wanted = y + r if act is None else act(act(y) + r)
        actual = conv_bn_act(x, conv, bn, act, r, act_before_add=True)
        torch.testing.assert_close(actual, wanted)


def hooked(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *args: None)
    return module


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
@pytest.mark.parametrize("which", [0, 1])
def test_hooks_run(which: int, kind: str) -> None:
    pair = [nn.Conv2d(4, 6, 3).eval(), norm(6)]
    calls: list[str] = []
    getattr(pair[which], f"register_{kind}")(lambda *args: calls.append(kind))
    assert "hook" in why_stock(*pair)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    conv_bn_act(x, *pair, RELU).sum().backward()
    assert calls == [kind]


def test_hook_of_the_activation_runs() -> None:
    act, calls = nn.ReLU(), []
    act.register_forward_hook(lambda *args: calls.append(1))
    check(torch.randn(1, 4, 5, 5), nn.Conv2d(4, 6, 3).eval(), norm(6), act)
    assert calls


def test_train_mode_is_stock() -> None:
    conv, bn = nn.Conv2d(4, 6, 3), norm(6).train()
    conv2, bn2 = copy.deepcopy((conv, bn))
    x = torch.randn(2, 4, 7, 7)
    with backends.observe() as choices:
        conv_bn_act(x, conv, bn, RELU).square().sum().backward()
    RELU(bn2(conv2(x))).square().sum().backward()
    assert not choices
    for mine, theirs in zip((*conv.parameters(), *bn.parameters()),
                            (*conv2.parameters(), *bn2.parameters()), strict=True):  # fmt: skip
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(bn.running_var, bn2.running_var)


def test_frozen_norm_while_the_convolution_trains() -> None:
    conv, bn = nn.Conv2d(4, 6, 3).train(), norm(6).eval()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    conv.double(), bn.double()
    tensors = [*conv.parameters(), *bn.parameters()]
    with backends.observe() as choices:
        mine = torch.autograd.grad(conv_bn_act(x, conv, bn, RELU).square().sum(), tensors)
    theirs = torch.autograd.grad(RELU(bn(conv(x))).square().sum(), tensors)
    assert len(choices) == 1
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("pool", "fused"),
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d((3, 2), (2, 1), (1, 0)), True),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.MaxPool2d(2, dilation=2), False),
        (nn.AvgPool2d(2), False),
        (nn.Identity(), False),
    ],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), None])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_stem(pool: nn.Module, fused: bool, act: nn.Module | None, mode: str) -> None:
    conv = nn.Conv2d(3, 8, 7, 2, 3, bias=False, padding_mode=mode).eval()
    bn, x = norm(8), torch.randn(2, 3, 22, 27)
    wide = [copy.deepcopy(m).double() if m is not None else None for m in (conv, bn, act)]
    with torch.no_grad(), backends.observe() as choices:
        actual = conv_bn_act_maxpool(x, conv, bn, act, pool)
        expected = pool(stock(x, conv, bn, act, None))
        exact = pool(stock(x.double(), *wide, None))
    assert_within_rule(actual, exact, expected, torch.float32)
    op = "conv_affine_relu_maxpool" if fused and type(act) is nn.ReLU else "conv_affine_act"
    assert [c.kernel.op for c in choices] == [op]
    assert (why_not_poolable(pool) is None) == fused


def test_pooling_with_indices() -> None:
    conv, pool = nn.Conv2d(3, 4, 3).eval(), nn.MaxPool2d(2, return_indices=True)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        values, indices = conv_bn_act_maxpool(x, conv, None, RELU, pool)
        wanted = pool(RELU(conv(x)))
    torch.testing.assert_close(values, wanted[0])
    assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, r: conv_bn_act(x.half(), nn.Conv2d(4, 4, 1), None),
        lambda x, r: conv_bn_act(x, nn.Conv2d(4, 4, 1), norm(4), RELU, r.half()),
        lambda x, r: functional.add_relu(x, x.half()),
    ],
    ids=["x", "residual", "add_relu"],
)
def test_dtypes_that_differ(call: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(TypeError, match="must have the dtype of"):
        call(x, x.clone())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("padding", [1, "same"])
def test_compile_and_export_of_modules(dynamic: bool, padding: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 2 if padding == "same" else 3, 1, padding), norm(4)

        def forward(self, x: Tensor) -> Tensor:
            y = conv_bn_act(x, self.conv, self.bn, RELU, x)
            return conv_bn_act_maxpool(y, self.conv, self.bn, RELU, nn.MaxPool2d(2))

    block = Block().eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    exported = torch.export.export(block, (torch.randn(2, 4, 8, 8),), dynamic_shapes=shapes)
    for n in (2, 3) if dynamic else (2,):
        x = torch.randn(n, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
            torch.testing.assert_close(exported.module()(x), block(x))
            # Edited weights are seen through both.
            block.bn.weight.mul_(-0.5)
            torch.testing.assert_close(compiled(x), block(x))
            torch.testing.assert_close(exported.module()(x), block(x))


def test_images_without_a_batch_run_as_stock() -> None:
    conv, relu = nn.Conv2d(3, 4, 3).eval(), nn.ReLU()
    x = torch.randn(3, 9, 9)
    with torch.no_grad():
        assert torch.equal(functional.conv_bn_act(x, conv, None, relu), relu(conv(x)))
        pool = nn.MaxPool2d(2)
        y = functional.conv_bn_act_maxpool(x, conv, None, relu, pool)
        assert torch.equal(y, pool(relu(conv(x))))
