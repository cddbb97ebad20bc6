"""The op ``bottleneck_chain``: against stock torch in float64, and what an op has to keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, functional
from fused_resnet.problem import channels_last_strides
from tests.chain_cases import call, chain_data, chain_problem, stock
from tests.helpers import CPU, DTYPES, assert_within_rule, short

PROBLEMS = {
    "identity": {},
    "even": {"store": "even"},
    "even_of_even_extents": {"store": "even", "h": 8, "w": 6},
    "transition": {"following": 128, "store": "even"},
    "last": {"following": 0},
    "pooled": {"following": 0, "store": "pool"},
    "projection": {"proj": 64},
    "strided_projection": {"m": 32, "proj": 48, "stride": 2, "h": 9, "w": 8},
    "thinned_projection": {"m": 32, "proj": 48, "stride": 2, "h": 9, "w": 8, "step": 1},
    "strided_residual": {"m": 32, "stride": 2},
    "wide": {"m": 48, "k": 96, "following": 40},
    "one_pixel": {"h": 1, "w": 1, "store": "even"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_the_composition(name: str, dtype: torch.dtype) -> None:
    problem = chain_problem(**PROBLEMS[name], dtype=dtype)
    args = chain_data(problem)
    references = stock(problem, args, torch.float64)
    for result, reference, usual, shape in zip(
        call(problem, args),
        references,
        stock(problem, args),
        (problem.out_shape, problem.next_shape),
        strict=True,
    ):
        assert result.shape == shape
        assert result.stride() == channels_last_strides(*shape)
        assert_within_rule(result, reference, usual, dtype)


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name: str) -> None:
    problem = chain_problem(**PROBLEMS[name], n=1, dtype=torch.float32)
    args = (*chain_data(problem), problem.stride, problem.store)
    torch.library.opcheck(torch.ops.fused_resnet.bottleneck_chain.default, args)


def test_no_images() -> None:
    problem = chain_problem(n=0)
    out, mid_next = call(problem, chain_data(problem))
    assert out.shape == (0, 256, 7, 9)
    assert mid_next.shape == (0, 64, 7, 9)


def test_inputs_of_any_layout() -> None:
    problem = chain_problem(dtype=torch.float32)
    args = list(chain_data(problem))
    expected = call(problem, tuple(args))
    args[0] = args[0].contiguous()
    args[1] = torch.stack([args[1], args[1]], -1)[..., 0]
    for result, right in zip(call(problem, tuple(args)), expected, strict=True):
        torch.testing.assert_close(result, right)


def _args(**changes: Any) -> tuple[Any, ...]:
    problem = chain_problem(m=8, n=1, dtype=torch.float32)
    names = ("mid", "residual", "weight2", "scale2", "shift2", "weight3", "scale3", "shift3",
             "weight_proj", "scale_proj", "shift_proj", "weight_next", "scale_next",
             "shift_next")  # fmt: skip
    named = dict(zip(names, chain_data(problem), strict=True)) | {"stride": 1, "store": "all"}
    return tuple((named | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mid": torch.zeros(1, 8, 7)}, ValueError, r"mid must be \[N, C, H, W\]"),
        ({"mid": torch.zeros(1, 8, 0, 9)}, ValueError, "no pixels"),
        ({"residual": torch.zeros(1, 32, 7, 8)}, ValueError, "residual must be"),
        ({"residual": torch.zeros(1, 32, 7, 9).half()}, TypeError, "dtype of mid"),
        ({"weight2": torch.zeros(8, 8, 1, 1)}, ValueError, "weight2 must be"),
        ({"weight2": torch.zeros(9, 8, 3, 3), "scale2": torch.ones(9), "shift2": torch.ones(9)},
         ValueError, "mid has 8 channels"),
        ({"scale3": torch.ones(31)}, ValueError, r"scale3 must be \[32\]"),
        ({"shift3": torch.ones(32).half()}, TypeError, "shift3 must be torch.float32"),
        ({"scale_next": None}, ValueError, "given together"),
        ({"weight_proj": torch.zeros(32, 32, 1, 1)}, ValueError, "given together"),
        ({"weight_proj": torch.zeros(16, 32, 1, 1), "scale_proj": torch.ones(16),
          "shift_proj": torch.ones(16)}, ValueError, "weight_proj must be"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"store": "odd"}, ValueError, "unknown store 'odd'"),
        ({"store": "pool"}, ValueError, "no next block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    args = _args(**changes)
    with pytest.raises(error, match=message):
        torch.ops.fused_resnet.bottleneck_chain(*args)
    with pytest.raises(error, match=message):
        torch.ops.fused_resnet.bottleneck_chain(
            *(t.to("meta") if isinstance(t, Tensor) else t for t in args)
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_refused(compiled: bool) -> None:
    args = list(_args())
    args[2] = nn.Parameter(args[2])
    run = torch.ops.fused_resnet.bottleneck_chain
    if compiled:
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="for inference and has no gradient"):
        run(*args)
    with torch.no_grad():
        assert not run(*args)[0].requires_grad


class Chain(nn.Module):
    """A module around the function, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        _, _, *tensors = chain_data(chain_problem(m=8, proj=8, dtype=torch.float32))
        for i, t in enumerate(tensors):
            self.register_parameter(f"p{i}", nn.Parameter(t))

    def forward(self, mid: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        p = [getattr(self, f"p{i}") for i in range(12)]
        return functional.bottleneck_chain(
            mid, x, tuple(p[:3]), tuple(p[3:6]), projection=tuple(p[6:9]), following=tuple(p[9:]),
        )  # fmt: skip


def test_compile_and_export() -> None:
    module = Chain().eval()
    inputs = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        expected = module(*inputs)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(
            module, inputs, dynamic_shapes=({0: batch}, {0: batch})
        ).module()
        for run in (compiled, exported):
            for result, right in zip(run(*inputs), expected, strict=True):
                torch.testing.assert_close(result, right)
            assert run(torch.randn(3, 8, 5, 6), torch.randn(3, 8, 5, 6))[0].shape[0] == 3


def test_autocast() -> None:
    module = Chain().eval()
    inputs = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out, mid_next = module(*inputs)
    assert out.dtype == mid_next.dtype == torch.bfloat16


def test_the_kernel_is_chosen_and_observed() -> None:
    problem = chain_problem(m=8, dtype=torch.float32)
    with backends.observe() as choices:
        call(problem, chain_data(problem))
    (choice,) = choices
    assert choice.problem == problem
    assert choice.kernel.full_name == "torch/aten"
    names = [k.full_name for k in backends.candidates("bottleneck_chain", problem, CPU)]
    assert names[-1] == "torch/aten"
    assert "chain 8->32->8 2x7x9 float32" in str(problem)


def test_every_kernel_is_verified_before_its_first_use() -> None:
    for kernel in backends.KERNELS:
        if kernel.op == "bottleneck_chain":
            assert backends.verdict(kernel, CPU, torch.float16) is None


def test_flops_and_bytes() -> None:
    # 64 channels of 56x56 in fp16, by hand: 17 M^2 multiply-adds a pixel, 10 M values.
    problem = chain_problem(64, 1, 56, 56)
    assert problem.flops == 2 * 3136 * 17 * 64**2
    vectors = 8 * (64 + 256 + 64)
    assert problem.min_bytes == 2 * (3136 * 10 * 64 + 17 * 64**2) + vectors
    pooled = chain_problem(64, 1, 56, 56, following=0, store="pool")
    assert pooled.min_bytes == 2 * (3136 * 5 * 64 + 256 + 13 * 64**2) + 8 * (64 + 256)
    assert sum(p.flops for p in problem.convolutions.values()) == problem.flops


def test_the_function_is_public() -> None:
    assert fused_resnet.functional.bottleneck_chain is functional.bottleneck_chain
