"""The Triton kernels compiled ahead of time for every GPU, and judged from their machine code.

No GPU is needed and nothing is timed. A representative part runs here; the full matrix, every
configuration that the heuristic returns for ResNet-18 and ResNet-50, is ``make certify``.
"""

import dataclasses
import math
import os
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="this torch comes without Triton")

import triton

from fused_resnet.backends.triton_ import im2col_kernel
from fused_resnet.backends.triton_.certify import (
    Case,
    cases,
    certify_case,
    chain_cases,
    chain_problems,
    compile_case,
    complaints,
    conv_cases,
    is_large,
    resnet_problems,
)
from fused_resnet.backends.triton_.chain_plan import (
    chain_launch,
    chain_tiles,
    offers,
    predicted_cycles,
)
from fused_resnet.backends.triton_.config import (
    ARCHS,
    MIN_SHARE,
    Arch,
    Config,
    Tile,
    configs,
    heuristic,
    stem_pool_tile,
)
from fused_resnet.backends.triton_.dense import nearest_tf32
from fused_resnet.backends.triton_.launch import TYPES
from fused_resnet.backends.triton_.layout import row_weights
from fused_resnet.backends.triton_.plans import (
    add_relu_launch,
    conv_launches,
    mean_launch,
    pad_launch,
    pool_strip,
    rows_layout,
    stem_pool_launch,
)
from fused_resnet.certify import certify_triton
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import AddReluProblem, ChainProblem, ConvProblem

from .ptx.runner import load

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and cannot compile"
)

CACHE = Path(__file__).parents[1] / ".cache" / "triton"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
on_every_gpu = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch.capability}")
A100, H100, B200 = ARCHS[0], ARCHS[3], ARCHS[4]


@pytest.fixture(autouse=True)
def cache_on_disk(monkeypatch):
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(CACHE))


def conv(c, k, r, n, hw, epilogue, dtype, stride=1, groups=1):
    return ConvProblem(
        n, c, hw, hw, k, r, r, (stride, stride), (r // 2, r // 2), (1, 1), groups, epilogue, dtype
    )


def assert_kept(found):
    found = list(found)
    assert found
    broken = [(case, complaints(case, certify_case(case))) for case in found]
    assert not [(str(case.problem), str(case.config), why) for case, why in broken if why]


#: One problem of each formulation: full tiles, a filled small GPU, split reductions.
REPRESENTATIVE = {
    "1x1": (conv(256, 1024, 1, 32, 14, "add_relu", BF16), "tf32"),
    "1x1-of-one-image": (conv(2048, 512, 1, 1, 7, "relu", F16), "tf32"),
    "3x3": (conv(256, 256, 3, 256, 14, "add_relu", F16), "tf32"),
    "3x3-of-one-image": (conv(128, 128, 3, 1, 28, "relu_add_relu", F16), "tf32"),
    "3x3-narrow": (conv(64, 64, 3, 32, 56, "relu", F16), "tf32"),
    "tf32": (conv(128, 128, 3, 32, 28, "relu", F32), "tf32"),
    "pooled-stem": (resnet_problems(50, 32, F16)[0], "tf32"),
    "stem": (resnet_problems(50, 32, BF16)[1], "tf32"),
}


@on_every_gpu
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_machine_code_keeps_the_promises(arch, name):
    problem, precision = REPRESENTATIVE[name]
    assert_kept(conv_cases(problem, arch, precision))


@pytest.mark.parametrize("arch", [A100, H100], ids=lambda arch: f"sm_{arch.capability}")
@pytest.mark.parametrize("r", [1, 3])
def test_full_precision_uses_no_tensor_cores(arch, r):
    problem = conv(128, 128, r, 32, 28, "add_relu", F32)
    assert_kept(conv_cases(problem, arch, "ieee"))


def test_triton_has_no_tensor_cores_for_turing():
    """Why GPUs of sm_75 are refused: what Triton makes for them multiplies in fp32, and spills."""
    problem = conv(256, 256, 1, 32, 14, "relu", F16)
    turing, config = Arch(75, 40), Config("gemm", Tile(64, 64, 32, 4, 2))
    (launch,) = conv_launches(problem, config, turing, "tf32")
    certificate = certify_case(Case(problem, turing, launch, config))
    assert certificate.tensor_kind == "fp32"
    assert certificate.spills


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@on_every_gpu
def test_large_layers_keep_tensor_cores_busy(arch, dtype):
    """What tiles promise; the certificates prove it of their codes. Nothing is compiled here."""
    for depth, n in product((18, 50), (1, 32, 256)):
        for problem in resnet_problems(depth, n, dtype):
            if is_large(problem):
                for config in configs(problem, arch, "tf32"):
                    assert config.tile.share >= MIN_SHARE, (str(problem), config.name)


@on_every_gpu
def test_merged_groups(arch):
    assert_kept(conv_cases(conv(128, 128, 3, 32, 56, "relu", F16, groups=32), arch, "tf32"))


@pytest.mark.parametrize("arch", [A100, H100, B200], ids=lambda arch: f"sm_{arch.capability}")
def test_channels_that_fill_no_tile(arch):
    # No spills; but rows of 17 elements allow no wide access.
    for case in conv_cases(conv(17, 19, 3, 4, 9, "add_relu", F16), arch, "tf32"):
        assert not certify_case(case).spills


@pytest.mark.parametrize(
    ("path", "arch", "r", "k"),
    [("gemm", A100, 1, 64), ("conv", A100, 3, 64), ("boxes", B200, 3, 128)],
)
def test_64_bit_offsets(path, arch, r, k):
    problem = conv(64, k, r, 2048, 224, "relu", F16)
    (case,) = conv_cases(problem, arch, "tf32")
    assert case.config.path == path
    assert dict(case.launch.constants)["WIDE"]
    assert_kept([case])
    # The row's offset is formed in 64 bits: 64-bit arithmetic that the narrow code lacks.
    narrow = dataclasses.replace(problem, n=32)
    (other,) = conv_cases(narrow, arch, "tf32")

    def arithmetic(case):
        return len(re.findall(r"\b(?:add|mul|mad)\S*\.s64", compile_case(case).asm["ptx"]))

    assert arithmetic(case) > arithmetic(other)


def test_memory_bound_kernels():
    flat = AddReluProblem((32, 256, 56, 56), F16, False, True)
    launches = {
        "add_relu": add_relu_launch(flat),
        "mean": mean_launch(32, 2048, 49, F16),
        "images": pad_launch((32, 3, 224, 224), (224, 224, 4), torch.uint8, F16, 2**22, True),
    }
    found = {name: certify_case(Case(name, H100, launch)) for name, launch in launches.items()}
    assert not any(certificate.spills for certificate in found.values())
    assert found["add_relu"].widths("LDG") == (16,)
    assert found["add_relu"].widths("STG") == (16,)
    assert found["mean"].widths("LDG") == (16,)


def test_what_breaks_a_promise_is_found():
    problem = conv(128, 128, 3, 32, 28, "add_relu", F16)
    good = heuristic(problem, H100, "tf32")
    assert good.tma

    def broken(config, arch=H100):
        (launch,) = conv_launches(problem, config, arch, "tf32")
        case = Case(problem, arch, launch, config)
        return " ".join(complaints(case, certify_case(case)))

    # 128 x 256 accumulators in 4 warps take all 255 registers of each thread.
    assert "local memory" in broken(Config("conv", Tile(128, 256, 64, 4, 3), tma=True))
    # Half of the shared memory bandwidth goes to copying the weights by cp.async.
    assert "share" in broken(dataclasses.replace(good, tma=False))
    # Six stages of 32 KiB.
    assert "does not fit" in broken(Config("conv", Tile(128, 128, 64, 8, 8, parts=2), tma=True))
    # More resident blocks than there are registers for.
    assert "blocks per SM" in broken(
        dataclasses.replace(good, tile=dataclasses.replace(good.tile, resident=4))
    )


def test_cases_cover_every_layer():
    everything = cases(archs=[A100], dtypes=[F16])
    names = {case.launch.kernel.fn.__name__ for case in everything}
    assert names >= {"gemm_kernel", "conv_kernel", "reduce_kernel", "conv_rows_kernel"}
    assert names >= {"stem_pool_kernel", "add_relu_kernel", "mean_kernel", "pad_kernel"}
    # 20 distinct convolutions in ResNet-50 with the unpooled stem: 1x1, 3x3, projections.
    assert len({p for p in resnet_problems(50, 1, F16) if p.pool is None}) == 24


def im2col_certificate(arch, problem):
    """The machine code of a Gluon kernel for a problem; one warp of the sm_100 one multiplies."""
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    warps, block_m, block_n, part, slots = im2col_kernel.SHAPES[arch.family]

    def box(rows, cols, kind="tensordesc", rank=""):
        layout = im2col_kernel.layout(rows, cols, problem.dtype)
        return f"{kind}<{TYPES[problem.dtype]}[{rows},{cols}],{rank}{layout!r}>"

    types = {
        "x": box(block_m, im2col_kernel.BLOCK_K, "tensordesc_im2col", "input_rank=4,"),
        "w": box(block_n, im2col_kernel.BLOCK_K),
        "scale": "*fp32",
        "shift": "*fp32",
        "residual": box(block_m, part),
        "y": box(block_m, part),
        "m": "i32",
    }
    constants = im2col_kernel.constants_of(problem, slots)
    source = GluonASTSource(
        im2col_kernel.kernel_of(arch.family),
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {(at,): [["tt.divisibility", 16]] for at in (2, 3)},
    )
    target = GPUTarget("cuda", arch.capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    return certify_triton(compiled, loop_warps=warps if arch is H100 else 1)


@pytest.mark.parametrize(
    ("arch", "problem", "kind"),
    [
        (H100, conv(128, 128, 3, 32, 28, "add_relu", F16), "wgmma"),
        (B200, conv(128, 128, 3, 32, 28, "add_relu", F16), "tcgen05"),
        (B200, conv(128, 256, 3, 32, 56, "relu_add_relu", BF16, stride=2), "tcgen05"),
    ],
    ids=str,
)
def test_im2col_compiles(arch, problem, kind):
    """The Gluon kernels, which nothing has ever executed, compile to what they are meant to be."""
    certificate = im2col_certificate(arch, problem)
    assert certificate.tensor_kind == kind
    assert not certificate.spills
    assert certificate.fits
    assert certificate.share >= MIN_SHARE
    assert "UTMALDG" in certificate.async_copies
    assert not certificate.loop.wgmma_waited_at_once


@pytest.mark.parametrize("family", im2col_kernel.SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_im2col_descriptors(family, stride):
    """What the kernel hands over: Triton's own checks of it, and the corners of the window."""
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    problem = conv(128, 256, 3, 5, 28, "add_relu", F16, stride=stride)
    out = torch.empty(problem.out_shape, dtype=F16, memory_format=torch.channels_last)
    x = torch.empty(5, 128, 28, 28, dtype=F16, memory_format=torch.channels_last)
    w = torch.empty(256, 3, 3, 128, dtype=F16)
    _, *tile, _ = im2col_kernel.SHAPES[family]
    pixels, weights, residual, y = im2col_kernel.descriptors(problem, x, w, out, out, tuple(tile))
    # Windows start at -1 and, the last ones, at 26 or 25: the first or second pixel before the end.
    assert pixels.pixel_box_lower_corner == [-1, -1]
    assert pixels.pixel_box_upper_corner == [-1 if stride == 1 else -2] * 2
    assert tuple(weights.shape) == (256, 1152)
    assert residual.shape == y.shape == (5 * math.prod(problem.conv_size), 256)


@pytest.mark.slow
@on_every_gpu
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_every_configuration_of_every_layer(arch, dtype):
    assert_kept(cases(archs=[arch], dtypes=[dtype]))


# ---------------------------------------------------------------- the compiled code, executed


def raw(tensor):
    """A dense tensor's memory as a numpy array, which shares it; bf16 as 16-bit integers."""
    flat = tensor.detach()
    return flat.view(torch.int16).numpy() if tensor.element_size() == 2 else flat.numpy()


def execute(launch, *arguments):
    """Run a launch's sm_80 PTX in the PTX runner."""
    compiled = compile_case(Case("", A100, launch))
    kernel = load(compiled.asm["ptx"])[launch.kernel.fn.__name__]
    numbers = {"i32": np.int32, "i64": np.int64}
    values = [
        raw(argument) if isinstance(argument, torch.Tensor) else numbers[kind](argument)
        for argument, (_, kind) in zip(arguments, launch.signature, strict=True)
    ]
    # Triton's own two pointers to scratch memory, which these kernels do not use.
    scratch = [np.uint64(0), np.uint64(0)]
    threads = 32 * dict(launch.options)["num_warps"]
    kernel.run(launch.grid, threads, [*values, *scratch], compiled.metadata.shared)


def executed_problem(c, k, r, dtype, **more):
    """Data of a problem, channels innermost as the kernels see them."""
    problem = conv(c, k, r, 2, 7, "add_relu", dtype, **more)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x = draw(2, c, 7, 7).contiguous(memory_format=torch.channels_last)
    residual = draw(*problem.out_shape).contiguous(memory_format=torch.channels_last)
    weight = draw(k, c, r, r) / (c * r * r) ** 0.5
    vectors = [torch.rand(k, generator=generator) + 0.5 for _ in range(2)]
    return problem, (x, weight, *vectors, residual)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("path", ["gemm", "conv"])
def test_compiled_code_computes_the_convolution(path, dtype):
    # 98 rows and 72 channels: ragged tiles both ways, and several slices of the reduction.
    problem, data = executed_problem(64, 72, 1 if path == "gemm" else 3, dtype)
    x, weight, scale, shift, residual = data
    tile = Tile(64, 64, 32 if dtype != F32 else 16, 4, 3)
    (launch,) = conv_launches(problem, Config(path, tile), A100, "tf32")
    # As the kernel packs them; the activations go in as they are.
    packed = nearest_tf32(weight) if dtype == F32 else weight
    w = packed.permute(0, 2, 3, 1).contiguous()
    y = torch.zeros_like(residual)
    sizes = (2 * 7 * 7,) if path == "gemm" else (2, 7, 7, 7, 7)
    execute(
        launch, x.permute(0, 2, 3, 1), w, scale, shift, residual.permute(0, 2, 3, 1),
        y.permute(0, 2, 3, 1), *sizes,
    )  # fmt: skip
    reference = reference_conv(problem, *data)
    allowed = error(stock_conv(problem, *data), reference)
    if dtype == F32:
        # No CPU has tf32: round the operands to its 10 mantissa bits.
        allowed = error(
            stock_conv(problem, nearest_tf32(x), nearest_tf32(weight), *data[2:]), reference
        )
    assert error(y, reference).within(allowed, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_compiled_code_computes_the_pooled_stem(dtype):
    problem = dataclasses.replace(resnet_problems(50, 2, dtype)[0], h=30, w=34)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    data = draw(2, 3, 30, 34), draw(64, 3, 7, 7) / 12, *torch.rand(2, 64, generator=generator), None
    x, weight, scale, shift, _ = data
    tile = stem_pool_tile(dtype, "tf32")
    rows = rows_layout(problem, tile.block_k)
    padded = torch.zeros(2, rows.hp, rows.wp, rows.cp, dtype=dtype)
    padded[:, 3:33, 3:37, :3] = x.permute(0, 2, 3, 1)
    y = torch.zeros(2, *problem.out_shape[2:], 64, dtype=dtype)
    launch = stem_pool_launch(problem, tile, A100, "tf32")
    sizes = (*problem.conv_size, *problem.out_shape[2:], rows.hp, rows.row_units)
    strip = pool_strip(problem, tile, A100)
    execute(launch, padded, row_weights(problem, weight, rows), scale, shift, y, *sizes, strip)
    reference = reference_conv(problem, *data)
    allowed = error(stock_conv(problem, *data), reference)
    assert error(y.permute(0, 3, 1, 2), reference).within(allowed, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_compiled_code_adds_and_rectifies(dtype):
    a, b = torch.randn(2, 3000, generator=torch.Generator().manual_seed(3)).to(dtype)
    a[5] = float("nan")
    y = torch.zeros_like(a)
    execute(add_relu_launch(AddReluProblem((3000,), dtype, False, True)), a, b, y, 3000 // 8)
    assert torch.equal(y.nan_to_num(7.0), torch.relu(a + b).nan_to_num(7.0))


def test_rows_layout_keeps_runs_aligned():
    for dtype in (F16, F32):
        rows = rows_layout(resnet_problems(50, 1, dtype)[1], 128 // dtype.itemsize)
        assert rows.wp * rows.cp % rows.unit == 0
        assert rows.seg * dtype.itemsize % 16 == 0


# --------------------------------------------------------------------------------------------------
# Chained bottlenecks.
# --------------------------------------------------------------------------------------------------


def chain_block(m, n=32, dtype=F16, following=None, proj=0, store="all"):
    size, stride = 3584 // m, 2 if proj > m else 1
    following = m if following is None else following
    hw = size * stride
    return ChainProblem(
        n, m, hw, hw, 4 * m, following, proj, stride, stride if proj else 1, store, dtype
    )


@pytest.mark.parametrize("arch", [A100, H100, B200], ids=lambda arch: f"sm_{arch.capability}")
def test_machine_code_of_a_chain_keeps_the_promises(arch):
    offer = offers(arch)[0]
    (problem, *_) = chain_problems(offer, 32, BF16)
    assert_kept([Case(problem, arch, chain_launch(problem, offer.tile), offer=offer)])


@pytest.mark.slow
@on_every_gpu
def test_machine_code_of_every_chain_keeps_the_promises(arch):
    assert_kept(chain_cases([arch], [F16]))


def test_a_broken_promise_of_a_chain_is_seen():
    offer = offers(A100)[0]
    problem = chain_block(64)
    case = Case(problem, A100, chain_launch(problem, offer.tile), offer=offer)
    certificate = certify_case(case)
    assert complaints(case, certificate) == []
    promised = dataclasses.replace(offer, registers=9, shared=8)
    broken = dataclasses.replace(case, offer=promised, arch=H100)
    assert len(complaints(broken, certificate)) == 3  # wgmma, blocks, shared memory


@on_every_gpu
def test_every_gpu_has_chains_for_the_stages_of_resnet50(arch):
    for n in (1, 32, 256):
        for block in (
            chain_block(64, n), chain_block(64, n, proj=64),
            chain_block(64, n, following=128, store="even"),
            chain_block(128, n), chain_block(128, n, proj=256),
            chain_block(128, n, following=256, store="even"), chain_block(256, n),
            chain_block(256, n, following=0),
        ):  # fmt: skip
            tiles = chain_tiles(block, arch)
            assert tiles, block
            assert all(tile.tma == (arch.capability in (90, 100)) for tile in tiles)
            fitting = [
                offer
                for offer in offers(arch)
                if offer.m == block.m
                and block.store in offer.stores
                and block.next <= offer.next
                and block.proj <= offer.proj
            ]
            best = min(fitting, key=lambda offer: predicted_cycles(block, offer, arch))
            assert tiles[0] == best.tile


def test_what_spills_is_not_offered():
    assert chain_tiles(chain_block(256, proj=512), A100)
    for arch in (H100, B200):
        assert not chain_tiles(chain_block(256, proj=512), arch)
    assert not chain_tiles(chain_block(256, following=512), B200)
    thinned = chain_tiles(chain_block(128, store="even"), A100)
    assert set(thinned) < set(chain_tiles(chain_block(128), A100))


def test_chains_of_large_tensors_take_wide_offsets():
    def wide(n):
        problem = chain_block(64, n)
        return dict(chain_launch(problem, offers(A100)[0].tile).constants)["WIDE"]

    assert not wide(2048)
    assert wide(4096)
