"""The native CPU kernel of add_relu, at every instruction-set level, against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet._build import extension, extension_error

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(extension is None, reason=f"no compiled extension: {extension_error}"),
]

LEVELS = ("generic", "avx2", "avx512")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def expected(a: Tensor, b: Tensor) -> Tensor:
    """The sum in float64, rounded once to the dtype, then relu.

    The native result must equal this bit for bit: a sum of two numbers of p bits that is rounded to
    2p + 2 bits first (fp32 for 16-bit floats) rounds to the same number of p bits.
    """
    rounded = (a.double() + b.double()).to(a.dtype)
    return torch.where(rounded < 0, torch.zeros_like(rounded), rounded)


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Equal with the sign of zeros, and NaN where NaN."""
    assert actual.dtype == wanted.dtype
    assert actual.stride() == wanted.stride()
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    number = ~wanted.isnan()
    assert torch.equal(actual.signbit()[number], wanted.signbit()[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1000003])
def test_sizes(native: Any, dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    a_before, b_before = a.clone(), b.clone()
    assert_same(native.add_relu(a, b, False), expected(a, b))
    assert torch.equal(a, a_before)
    assert torch.equal(b, b_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_writes_a_and_nothing_beyond(native: Any, dtype: torch.dtype) -> None:
    # A tail of 5 in the middle of a buffer: what lies around it must not be written.
    buffer = torch.randn(64).to(dtype)
    before = buffer.clone()
    a, b = buffer[16:37], torch.randn(21).to(dtype)
    wanted = expected(a, b)
    version = a._version
    result = native.add_relu(a, b, True)
    assert result.data_ptr() == a.data_ptr()
    assert_same(a, wanted)
    assert torch.equal(buffer[:16], before[:16])
    assert torch.equal(buffer[37:], before[37:])
    assert a._version > version, "autograd would not see the edit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_with_itself(native: Any, dtype: torch.dtype) -> None:
    a = torch.randn(37).to(dtype)
    wanted = expected(a, a)
    assert_same(native.add_relu(a, a, True), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(native: Any, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    values = torch.tensor(
        (
            *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan),
            *(info.max, info.min, info.smallest_normal, -info.smallest_normal),
            *(subnormal, -subnormal, 3 * subnormal, info.smallest_normal - subnormal),
            *(info.eps / 2, 1 + info.eps),
        ),
        dtype=torch.float64,
    ).to(dtype)
    assert torch.count_nonzero(values) == len(values) - 2, "a subnormal was lost in the making"
    a, b = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    a, b = a.contiguous(), b.contiguous()
    result = native.add_relu(a, b, False)
    assert_same(result, expected(a, b))
    assert_same(result, torch.relu(a + b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_survives(native: Any, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    a = bits.view(dtype)
    zero = torch.full_like(a, -0.0)  # x + -0 is x, even for x = -0
    assert_same(native.add_relu(a, zero, False), torch.relu(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_halfway_cases_to_even(native: Any, dtype: torch.dtype) -> None:
    # Numbers of [1, 2) plus half their distance: sums that lie exactly between two numbers, then
    # ones that lie just beside that, where fp32 still has digits to tell.
    eps = torch.finfo(dtype).eps
    a = (1 + eps * torch.arange(int(1 / eps), dtype=torch.float64)).to(dtype)
    for step in (eps / 2, eps / 2 * (1 + eps), eps / 2 * (1 - eps / 2), -eps / 4):
        b = torch.full_like(a, step)
        assert_same(native.add_relu(a, b, False), expected(a, b))


def test_every_float16_sum_of_one_with_all(native: Any) -> None:
    # All finite float16 with partners over the whole range: each rounding path of the conversion.
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    a = a[a.isfinite()]
    for value in (2.0**-24, 2.0**-15, 3 * 2.0**-20, 1 / 3, 1.0, 777.5, 65504.0):
        b = torch.full_like(a, value)
        assert_same(native.add_relu(a, b, False), expected(a, b))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_channels_last_on_several_threads(native: Any, threads: int) -> None:
    a = torch.randn(3, 64, 37, 29).to(memory_format=torch.channels_last)
    b = torch.randn(3, 64, 37, 29).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = native.add_relu(a, b, False)
    finally:
        torch.set_num_threads(before)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_same(result, expected(a, b))


def test_strides_of_extents_of_one_are_ignored(native: Any) -> None:
    a = torch.randn(1, 8, 1, 1)
    b = (
        torch.randn(1, 8, 1, 1)
        .to(memory_format=torch.channels_last)
        .as_strided(a.shape, (9, 1, 5, 7))
    )
    assert_same(native.add_relu(a, b, False), expected(a, b).contiguous())


def test_misaligned_pointers(native: Any) -> None:
    for dtype in DTYPES:
        a, b = torch.randn(101).to(dtype)[1:], torch.randn(103).to(dtype)[3:]
        assert_same(native.add_relu(a, b, False), expected(a, b))


def test_refuses_what_it_cannot_compute() -> None:
    assert extension is not None
    a = torch.ones(2, 3)
    refused: list[tuple[Tensor, Tensor, type[Exception], str]] = [
        (a, torch.ones(3, 2), ValueError, r"one shape, found \[2, 3\] and \[3, 2\]"),
        (a, torch.ones(6), ValueError, r"one shape, found \[2, 3\] and \[6\]"),
        (a, a.double(), TypeError, "one dtype, found Float and Double"),
        (a.int(), a.int(), TypeError, "float32, float16, bfloat16 or float64, found Int"),
        (a, torch.ones(3, 2).t(), ValueError, r"same strides, .*\[3, 1\] and \[1, 2\]"),
        (a[:, :2], a[:, :2], ValueError, r"dense .* strides \[3, 1\]"),
        (a.to("meta"), a, ValueError, "CPU tensors, found a on meta and b on cpu"),
    ]
    for left, right, error, message in refused:
        with pytest.raises(error, match=message):
            extension.add_relu(left, right, False)


def test_refuses_to_write_over_what_it_has_yet_to_read() -> None:
    assert extension is not None
    buffer = torch.ones(10)
    with pytest.raises(ValueError, match="partial overlap"):
        extension.add_relu(buffer[1:], buffer[:-1], True)


def test_releases_the_gil() -> None:
    # The kernel on one thread takes milliseconds; a Python thread must run meanwhile.
    code = """
import sys, threading, torch
from fused_resnet._build import extension
torch.set_num_threads(1)
sys.setswitchinterval(1000)  # only a release of the lock lets the other thread in
a = torch.ones(20_000_000)
go, ran = threading.Event(), []
def other():
    go.wait()
    ran.append(True)
thread = threading.Thread(target=other)
thread.start()
go.set()
before = len(ran)
result = extension.add_relu(a, a, False)  # kept: torch releases the lock to free a tensor
print(len(ran) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "1"


def isa_in_process(value: str) -> subprocess.CompletedProcess[str]:
    """Ask a fresh process, started with FUSED_RESNET_ISA, for the level in use."""
    return subprocess.run(
        [sys.executable, "-c", "from fused_resnet._build import extension; print(extension.isa())"],
        env={**os.environ, "FUSED_RESNET_ISA": value},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_environment_forces_a_level() -> None:
    assert isa_in_process("generic").stdout.strip() == "generic"


def test_environment_naming_no_level_is_an_error() -> None:
    done = isa_in_process("avx1024")
    assert done.returncode != 0
    assert "ValueError: FUSED_RESNET_ISA=avx1024: expected a level that this CPU can run" in (
        done.stderr
    )


def test_level_by_default_is_the_highest_and_changes_are_checked() -> None:
    assert extension is not None
    available = extension.isa_available()
    assert available == list(LEVELS[: len(available)])
    assert isa_in_process("").stdout.strip() == available[-1]
    with pytest.raises(ValueError, match="isa=neon: expected a level"):
        extension.set_isa("neon")


def test_level_agrees_with_the_kernels_view_of_the_cpu() -> None:
    assert extension is not None
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is None:
        pytest.skip("/proc/cpuinfo lists no x86 flags here")
    avx2 = {"avx2", "fma", "f16c"} <= set(flags)
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags)
    assert extension.isa_available()[-1] == LEVELS[avx2 + avx512]
    assert extension.cpu_features() == {
        "avx512_bf16": avx512 and "avx512_bf16" in flags,
        "amx_bf16": avx512 and {"amx_bf16", "amx_tile"} <= set(flags),
    }
