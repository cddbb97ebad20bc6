"""Every formulation of the convolution against float64, in the interpreter."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.backends.triton_.certify import resnet_problems
from fused_resnet.backends.triton_.config import Config, Tile, configs, has_boxes, heuristic
from fused_resnet.backends.triton_.device import precision_of
from fused_resnet.backends.triton_.kernels import TritonConv
from fused_resnet.backends.triton_.paths import BoxesPath, ConvPath, make_path
from fused_resnet.backends.triton_.plans import conv_launches
from fused_resnet.numerics import stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem

from .harness import (
    A100,
    B200,
    CONV,
    DTYPES,
    FAMILIES,
    H100,
    assert_right,
    check,
    conv_data,
    conv_problem,
)

CPU = torch.device("cpu")
family = pytest.mark.parametrize("family", FAMILIES)
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The interpreter is numpy, which says so when it computes with Inf and NaN.
nonfinite = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@family
@dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("r", [1, 3])
def test_every_epilogue(family, dtype, epilogue, r):
    check(CONV[family], conv_problem(64, 96, r, epilogue=epilogue, dtype=dtype))


@dtype
@pytest.mark.parametrize(("c", "k"), [(1, 64), (3, 64), (8, 24), (17, 19), (64, 17), (72, 136)])
@pytest.mark.parametrize("r", [1, 3])
def test_channels_that_fill_no_tile(dtype, c, k, r):
    check(CONV["mma"], conv_problem(c, k, r, epilogue="add_relu", dtype=dtype))


@family
@pytest.mark.parametrize(("c", "k"), [(8, 24), (17, 19), (72, 200)])
@pytest.mark.parametrize("r", [1, 3])
def test_channels_that_fill_no_box(family, c, k, r):
    # 72 channels are rows of whole 16-byte units, 17 are not: descriptors serve the first only.
    check(CONV[family], conv_problem(c, k, r, epilogue="add_relu"))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_geometry(stride, padding, dilation):
    problem = conv_problem(
        32, 32, 3, h=9, w=11, stride=stride, padding=padding, dilation=dilation, epilogue="add"
    )
    check(CONV["mma"], problem)


@pytest.mark.parametrize(
    ("r", "s", "stride", "padding", "dilation"),
    [
        (5, 5, 1, 2, 1),
        (1, 7, 1, (0, 3), 1),
        (7, 1, (2, 1), (3, 0), 1),
        (2, 4, (3, 2), (0, 1), (2, 1)),
        (1, 1, 2, 0, 1),
        (1, 1, 1, 1, 1),
        (16, 1, 1, (8, 0), 1),
        (2, 16, 1, (0, 8), 1),
    ],
)
def test_filters(r, s, stride, padding, dilation):
    problem = conv_problem(
        16, 32, r, s=s, h=17, w=19, stride=stride, padding=padding, dilation=dilation
    )
    check(CONV["mma"], problem)


@family
@pytest.mark.parametrize(
    ("c", "k", "groups"),
    [(64, 64, 2), (128, 128, 32), (32, 32, 32), (20, 40, 20), (96, 96, 3), (24, 12, 12)],
    ids=["two", "resnext", "depthwise", "multiplier", "three", "narrowing"],
)
def test_groups(family, c, k, groups):
    check(CONV[family], conv_problem(c, k, 3, stride=2, groups=groups, epilogue="relu_add_relu"))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 13), (5, 3), (13, 17)])
def test_batches_and_odd_sizes(n, r, h, w):
    check(CONV["wgmma"], conv_problem(64, 64, r, n=n, h=h, w=w, epilogue="add_relu"))


@dtype
def test_other_layouts_of_every_operand(dtype):
    problem = conv_problem(32, 32, 3, epilogue="add_relu", dtype=dtype)
    x, weight, scale, shift, residual = conv_data(problem)
    strided = torch.zeros(2, 64, 14, 9, dtype=dtype)[:, ::2, ::2]
    strided.copy_(x)
    memory = torch.zeros(x.numel() + 1, dtype=dtype)[1:]
    misaligned = memory.as_strided(x.shape, x.stride()).copy_(x)
    assert misaligned.data_ptr() % 16 != 0
    kernel = CONV["mma"]
    for other in (x.contiguous(), strided, misaligned):
        data = (
            other,
            weight.contiguous(memory_format=torch.channels_last),
            scale.repeat_interleave(2)[::2],
            torch.cat([shift[:1], shift])[1:],
            residual.contiguous(),
        )
        assert_right(kernel.run(problem, *data), problem, data)


@pytest.mark.parametrize("family", ["mma", "wgmma"])
@pytest.mark.parametrize(("c", "r"), [(2048, 1), (256, 3)])
def test_split_reduction_fills_the_gpu(family, c, r):
    problem = conv_problem(c, 128, r, n=1, h=3, w=3, epilogue="add_relu")
    assert heuristic(problem, FAMILIES[family], "tf32").split_k > 1
    check(TritonConv(FAMILIES[family]), problem)


@family
@dtype
def test_every_configuration_of_the_space(family, dtype):
    arch = FAMILIES[family]
    for c, r in ((256, 1), (64, 3)):
        problem = conv_problem(c, 256, r, n=1, h=3, w=5, epilogue="add_relu", dtype=dtype)
        data = conv_data(problem)
        x, weight, scale, shift, residual = data
        space = list(configs(problem, arch, "tf32"))
        seen = set()
        for config in space:
            # One split of each tile; the others differ in the number of programs alone.
            kind = config.path, config.tile, config.split_k > 1
            if kind in seen:
                continue
            seen.add(kind)
            path = make_path(problem, config, arch, "tf32", CPU)
            y = torch.empty(problem.out_shape, dtype=dtype, memory_format=torch.channels_last)
            path.start(x, path.pack(weight), scale, shift, residual, y)
            assert_right(y, problem, data)
        paths = {"gemm", "conv"} if r == 1 else {"conv"}
        # The other formulation of sm_100; of 1x1 layers it takes those whose reduction is split.
        if family == "tcgen05" and (r == 3 or dtype == torch.float32):
            paths.add("boxes")
        assert {config.path for config in space} == paths


def check_boxes(problem, split_k=1, seed=0):
    """Pixels by descriptors, in tiles so small that a few pixels and channels have ragged edges."""
    config = Config("boxes", Tile(32, 32, 16, 4, 3), split_k=split_k, tma=True)
    path = make_path(problem, config, B200, "tf32", CPU)
    assert isinstance(path, BoxesPath)
    x, weight, scale, shift, residual = data = conv_data(problem, seed)
    y = torch.empty(problem.out_shape, dtype=problem.dtype, memory_format=torch.channels_last)
    y.fill_(float("nan"))
    path.start(x, path.pack(weight), scale, shift, y if residual is None else residual, y)
    assert_right(y, problem, data)


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_boxes_of_any_geometry(stride, padding, dilation):
    check_boxes(
        conv_problem(
            16, 24, 3, h=6, w=6, stride=stride, padding=padding, dilation=dilation, epilogue="add"
        )
    )


@dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_boxes_finish_like_every_other_path(dtype, epilogue):
    # 9 slices in 4 splits of 3: the last program has none, and must contribute zeros.
    split_k = 4 if epilogue == "add_relu" else 1
    check_boxes(conv_problem(16, 40, 3, n=3, h=5, w=3, epilogue=epilogue, dtype=dtype), split_k)


@st.composite
def problems_of_boxes(draw):
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, (r, s), padding, strict=True)
    ]
    h, w = (
        t * (-(-size // t) + draw(st.integers(0, 3))) for size, t in zip(least, stride, strict=True)
    )
    return ConvProblem(
        draw(st.integers(1, 5)), 16 * draw(st.integers(1, 3)), h, w, draw(st.integers(1, 40)), r, s,
        stride, padding, dilation, 1, draw(st.sampled_from(EPILOGUES)),
        draw(st.sampled_from(DTYPES)),
    )  # fmt: skip


any_boxes = given(
    problem=problems_of_boxes(), split_k=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99)
)


@settings(max_examples=12, deadline=None, derandomize=True)
@any_boxes
def test_boxes_of_any_problem(problem, split_k, seed):
    assert has_boxes(problem)
    check_boxes(problem, split_k, seed)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@any_boxes
def test_boxes_of_any_problem_at_length(problem, split_k, seed):
    check_boxes(problem, split_k, seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_128_channels_take_boxes_on_sm_100(dtype, stride):
    problem = conv_problem(
        128, 128, 3, n=1, h=14, w=14, stride=stride, epilogue="add_relu", dtype=dtype
    )
    config = heuristic(problem, dataclasses.replace(B200, sms=1), "tf32")
    assert config.path == "boxes"
    check(CONV["tcgen05"], problem)
    # Rows that the stride does not divide have no view by parities.
    odd = dataclasses.replace(problem, h=13, stride=(2, 1))
    assert {config.path for config in configs(odd, B200, "tf32")} == {"conv"}


def test_full_precision_is_followed(monkeypatch):
    problem = conv_problem(64, 64, 3, dtype=torch.float32)
    assert precision_of(torch.float32) == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert precision_of(torch.float32) == "ieee"
    assert precision_of(torch.float16) == "tf32"
    check(CONV["mma"], problem)
    check(CONV["wgmma"], conv_problem(64, 64, 1, dtype=torch.float32))


def layers(slow):
    problems = {
        dataclasses.replace(p, h=2 * p.stride[0] + 1, w=3, n=1)
        for depth in (18, 50)
        for p in resnet_problems(depth, 1, torch.float16)
        if p.pool is None
    }
    for p in sorted(problems, key=str):
        big = p.c * p.k * p.r * p.s > 2**18
        if big == slow:
            yield pytest.param(p, id=str(p))


@pytest.mark.parametrize("problem", list(layers(slow=False)))
def test_resnet_layers(problem):
    check(CONV["mma"], problem)


@pytest.mark.slow
@pytest.mark.parametrize("problem", list(layers(slow=True)))
def test_large_resnet_layers(problem):
    for kernel in CONV.values():
        check(kernel, problem)


@pytest.mark.slow
@dtype
@pytest.mark.parametrize("problem", list(layers(slow=False)))
def test_resnet_layers_in_every_family(problem, dtype):
    for kernel in CONV.values():
        check(kernel, dataclasses.replace(problem, dtype=dtype))


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, (r, s), padding, strict=True)
    ]
    return ConvProblem(
        n=draw(st.integers(1, 3)),
        c=groups * draw(st.integers(1, 20)),
        h=draw(st.integers(least[0], least[0] + 8)),
        w=draw(st.integers(least[1], least[1] + 8)),
        k=groups * draw(st.integers(1, 40)),
        r=r,
        s=s,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        epilogue=draw(st.sampled_from(EPILOGUES)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 99))
def test_any_problem(problem, family, seed):
    check(CONV[family], problem, seed)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(problem=problems(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 99))
def test_any_problem_at_length(problem, family, seed):
    check(CONV[family], problem, seed)


@nonfinite
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("family", ["mma", "tcgen05"])
def test_merged_groups_do_not_see_each_others_infinities(value, family):
    problem = conv_problem(64, 64, 3, groups=16, h=5, w=5, n=1, epilogue="none")
    data = conv_data(problem)
    data[0][0, 5, 2, 2] = value
    assert heuristic(problem, FAMILIES[family], "tf32").merged > 1
    result = CONV[family].run(problem, *data)
    assert_right(result, problem, data)
    assert result[0, :4].isfinite().all()
    assert not result[0, 4:8].isfinite().all()


@nonfinite
@pytest.mark.parametrize("r", [1, 3])
def test_nan_passes_relu_as_in_torch(r):
    problem = conv_problem(32, 32, r, n=1, epilogue="relu_add_relu")
    data = conv_data(problem)
    data[0][0, 3, 4, 4] = float("nan")
    result = CONV["mma"].run(problem, *data)
    assert torch.equal(result.isnan(), stock_conv(problem, *data).isnan())
    assert result.isnan().any()


def test_bfloat16_rounds_to_nearest_even_and_carries():
    # acc = x exactly: a 1x1 convolution with the identity. 1.998 rounds up into the next exponent.
    problem = conv_problem(16, 16, 1, n=1, h=4, w=8, epilogue="none", dtype=torch.bfloat16)
    x = conv_data(problem)[0]
    values = torch.cat([torch.linspace(1.98, 2.01, 8), torch.tensor([1.0, 3.0, -1.998, 1e-30] * 2)])
    eye = torch.eye(16, dtype=torch.bfloat16).view(16, 16, 1, 1)
    result = CONV["mma"].run(problem, torch.zeros_like(x), eye, torch.ones(16), values, None)
    expected = values.to(torch.bfloat16).view(1, 16, 1, 1).expand_as(result)
    assert torch.equal(result, expected)


def test_packed_weights_follow_the_parameters():
    problem = conv_problem(32, 32, 3)
    x, weight, scale, shift, residual = conv_data(problem)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    kernel = TritonConv(A100)
    before = kernel.run(problem, x, weight, scale, shift, residual)
    packed = kernel.packed(problem, weight, scale, shift)
    assert kernel.packed(problem, weight, scale, shift) is packed
    weight.mul_(0.5)
    scale.add_(1.0)
    data = x, weight, scale, shift, residual
    after = kernel.run(problem, *data)
    assert_right(after, problem, data)
    assert not torch.equal(before, after)


def test_offsets_beyond_32_bits():
    """Windows 2**20 rows apart in an image of 8 GiB, of which three rows are ever touched."""
    rows, width, c = 2 * 2**20 + 1, 64, 32
    size = rows * width * c
    assert size > 2**31
    # np.zeros maps pages when they are touched; torch.zeros would write them all.
    image = torch.from_numpy(np.zeros(size, np.float16)).view(1, rows, width, c)
    x = image.permute(0, 3, 1, 2)
    problem = conv_problem(c, 32, 1, n=1, h=rows, w=width, stride=(2**20, 8), epilogue="relu")
    small = dataclasses.replace(problem, h=3, stride=(1, 8))
    data = conv_data(small)
    for i in range(3):
        image[0, i * 2**20] = data[0][0, :, i].permute(1, 0)
    # The same numbers, gathered from far and from near.
    far = CONV["mma"].run(problem, x, *data[1:])
    assert_right(far, small, data)


def test_64_bit_offsets_are_chosen_by_size():
    wide = conv_problem(64, 64, 3, n=1024, h=224, w=224)
    narrow = dataclasses.replace(wide, n=32)

    def is_wide(problem):
        config = heuristic(problem, A100, "tf32")
        return dict(conv_launches(problem, config, A100, "tf32")[0].constants)["WIDE"]

    assert is_wide(wide)
    assert not is_wide(narrow)


def test_reasons_for_refusal():
    kernel = CONV["mma"]
    assert "larger than 16" in kernel.supports(conv_problem(8, 8, 17), CPU)
    assert "float64" in kernel.supports(conv_problem(dtype=torch.float64), CPU)
    assert "xpu" in kernel.supports(conv_problem(), torch.device("xpu"))
    assert not kernel.promising(conv_problem(), CPU)


def test_a_split_that_leaves_a_program_without_work():
    # 9 slices in 4 splits of 3: the last program has none, and must contribute zeros.
    problem = conv_problem(64, 64, 3, n=1, h=3, w=3, epilogue="none")
    tile = Tile(64, 64, 64, 4, 3)
    path = make_path(problem, Config("conv", tile, split_k=4), A100, "tf32", CPU)
    assert isinstance(path, ConvPath)
    data = conv_data(problem)
    y = torch.full(problem.out_shape, float("nan"), dtype=torch.float16)
    y = y.contiguous(memory_format=torch.channels_last)
    path.start(data[0], path.pack(data[1]), data[2], data[3], y, y)
    assert_right(y, problem, data)


def test_configurations_differ_between_gpus():
    problem = conv_problem(256, 256, 1, n=32, h=14, w=14)
    assert not heuristic(problem, A100, "tf32").tma
    assert heuristic(problem, H100, "tf32").tma
    assert heuristic(problem, B200, "tf32").warp_specialize
