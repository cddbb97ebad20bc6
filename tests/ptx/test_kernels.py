"""Whole kernels, as nvcc and Triton compile them, against float64."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.nvcc import compile_cuda, needs_nvcc

from .parse import PtxError
from .runner import Kernel, load

RNG = np.random.default_rng(2)

GEMM = r"""
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(to)), "l"(from),
               "r"(valid ? 16 : 0) : "memory");
}
__device__ void ldmatrix(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared(p)) : "memory");
}
__device__ void ldmatrix_t(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared(p)) : "memory");
}
#define MMA(TYPE, NAME)                                                                          \
  __device__ void mma(TYPE, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, "   \
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                \
  }
MMA(__half, "f16")
MMA(__nv_bfloat16, "bf16")
__device__ __half narrow(__half, float x) { return __float2half(x); }
__device__ __nv_bfloat16 narrow(__nv_bfloat16, float x) { return __float2bfloat16(x); }

// y[M, N] = relu(a[M, K] b[K, N] * scale[N] + shift[N]); one warp a [16, 16] tile, K and N
// multiples of 8. BUG reads rows beyond M.
struct Size { int m, n, k; };
template <class T, bool BUG>
__device__ void gemm(const T* a, const T* b, const float* scale, const float* shift, T* y, Size s) {
  __shared__ __align__(16) T ta[2][16][24], tb[2][16][24];
  const int lane = threadIdx.x, m0 = blockIdx.y * 16, n0 = blockIdx.x * 16, c = lane % 2 * 8;
  float d[2][4] = {};
  auto load = [&](int k, int stage) {
    int m = m0 + lane / 2, n = n0 + c;
    bool va = (BUG || m < s.m) && k + c < s.k, vb = k + lane / 2 < s.k && n < s.n;
    copy16(&ta[stage][lane / 2][c], va ? a + (size_t)m * s.k + k + c : a, va);
    copy16(&tb[stage][lane / 2][c], vb ? b + (size_t)(k + lane / 2) * s.n + n : b, vb);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  load(0, 0);
  for (int k = 0, stage = 0; k < s.k; k += 16, stage ^= 1) {
    if (k + 16 < s.k) {
      load(k + 16, stage ^ 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    uint32_t fa[4], fb[4];
    ldmatrix(fa, &ta[stage][lane % 16][lane / 16 * 8]);
    ldmatrix_t(fb, &tb[stage][lane % 16][lane / 16 * 8]);
    mma(T(), d[0], fa, fb[0], fb[1]);
    mma(T(), d[1], fa, fb[2], fb[3]);
    __syncthreads();
  }
  for (int i = 0; i < 8; i++) {
    int m = m0 + lane / 4 + i % 4 / 2 * 8, n = n0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (m < s.m && n < s.n)
      y[(size_t)m * s.n + n] = narrow(T(), fmaxf(d[i / 4][i % 4] * scale[n] + shift[n], 0.f));
  }
}
#define GEMM(NAME, T, BUG)                                                                     \
  extern "C" __global__ void NAME(const T* a, const T* b, const float* scale, const float* shift, \
                                  T* y, Size s) { gemm<T, BUG>(a, b, scale, shift, y, s); }
GEMM(gemm_half, __half, false)
GEMM(gemm_bfloat, __nv_bfloat16, false)
GEMM(gemm_bug, __half, true)
"""

MORE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void row_sum(const float* x, float* y, int columns) {
  __shared__ float part[32];
  float s = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) s += x[blockIdx.x * columns + i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_down_sync(~0u, s, o);
    if (threadIdx.x == 0) y[blockIdx.x] = s;
  }
}

extern "C" __global__ void add_relu(const __half2* a, const __half2* b, __half2* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    y[i] = __hmax2(__hadd2(a[i], b[i]), __float2half2_rn(0.f));
}

extern "C" __global__ void bfloat_affine(const __nv_bfloat162* x, __nv_bfloat162* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __hfma2(x[i], __float2bfloat162_rn(1.5f), __float2bfloat162_rn(-0.25f));
}

// Integer work of all kinds: division by a variable, a switch, an array that the thread indexes.
extern "C" __global__ void integers(const int* x, long long* y, int divisor, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int table[8];
  for (int j = 0; j < 8; j++) table[j] = x[i] / divisor + j * (x[i] % divisor);
  long long v = table[i & 7];
  switch (x[i] & 7) {
    case 0: v *= x[i]; break;
    case 1: v -= 5; break;
    case 2: v = v / 7; break;
    case 3: v ^= 0x55; break;
    case 4: v <<= 33; break;
    case 5: v = -v % 11; break;
    default: v += __popc(x[i]); break;
  }
  y[i] = v;
}
"""


def cuda(source: str, name: str) -> Kernel:
    ptx, _ = compile_cuda(source, "ptx", "sm_80")
    return load(ptx.decode())[name]


def as_bfloat(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def gemm_arguments(m: int, n: int, k: int, bfloat: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Arguments of a GEMM (the last is y, all NaN) and its float64 result before narrowing."""
    a, b = RNG.standard_normal((m, k)), RNG.standard_normal((k, n))
    scale, shift = (RNG.standard_normal(n).astype(np.float32) for _ in range(2))
    cast = as_bfloat if bfloat else (lambda v: v.astype(np.float16))
    a, b = cast(a), cast(b)
    wide = from_bfloat if bfloat else (lambda v: v.astype(np.float64))
    exact = np.maximum(wide(a) @ wide(b) * scale.astype(np.float64) + shift, 0)
    y = np.full((m, n), 0x7FFF, np.uint16) if bfloat else np.full((m, n), np.nan, np.float16)
    return [a, b, scale, shift, y], exact


@needs_nvcc
@pytest.mark.parametrize("bfloat", [False, True], ids=["half", "bfloat"])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 16), (37, 40, 72), (1, 8, 8)])
def test_cuda_gemm(m: int, n: int, k: int, bfloat: bool) -> None:
    arguments, exact = gemm_arguments(m, n, k, bfloat)
    kernel = cuda(GEMM, "gemm_bfloat" if bfloat else "gemm_half")
    size = np.array([m, n, k], np.int32).tobytes()
    executed = kernel.run((-(-n // 16), -(-m // 16)), 32, [*arguments, size])
    assert executed["mma"] == 2 * -(-k // 16)
    y = from_bfloat(arguments[-1]) if bfloat else arguments[-1].astype(np.float64)
    # One rounding to the output's format, and what fp32 accumulation may add.
    unit = 2.0**-8 if bfloat else 2.0**-11
    assert (np.abs(y - exact) <= unit * np.abs(exact) * 1.01 + 1e-5).all()


@needs_nvcc
def test_a_dropped_predicate_is_found() -> None:
    arguments, _ = gemm_arguments(17, 16, 16, bfloat=False)
    size = np.array([17, 16, 16], np.int32).tobytes()
    with pytest.raises(PtxError, match=r"cp\.async.*out of bounds.*thread \(2, 0, 0\)"):
        cuda(GEMM, "gemm_bug").run((1, 2), 32, [*arguments, size])


@needs_nvcc
def test_cuda_reduction() -> None:
    x, y = RNG.standard_normal((7, 1000)).astype(np.float32), np.zeros(7, np.float32)
    cuda(MORE, "row_sum").run(7, 128, [x, y, 1000])
    np.testing.assert_allclose(y, x.astype(np.float64).sum(1), rtol=0, atol=1e-4)


@needs_nvcc
def test_cuda_packed_halves() -> None:
    a, b = (RNG.standard_normal(1000).astype(np.float16) for _ in range(2))
    y = np.full(1000, np.nan, np.float16)
    cuda(MORE, "add_relu").run(2, 96, [a, b, y, 500])
    np.testing.assert_array_equal(y, np.maximum(a + b, np.float16(0)))
    x = as_bfloat(RNG.standard_normal(300))
    y = np.zeros(300, np.uint16)
    cuda(MORE, "bfloat_affine").run(2, 96, [x, y, 150])
    exact = from_bfloat(x) * 1.5 - 0.25
    assert (np.abs(from_bfloat(y) - exact) <= 2.0**-8 * np.abs(exact)).all()


@needs_nvcc
def test_cuda_integers() -> None:
    x = RNG.integers(-(2**31), 2**31, 500).astype(np.int32)
    y = np.zeros(500, np.int64)
    cuda(MORE, "integers").run(4, 128, [x, y, 13, 500])

    def truncated(p: int, q: int) -> int:
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for i, v in enumerate(x.tolist()):
        quotient = truncated(v, 13)
        t = quotient + (i & 7) * (v - 13 * quotient)
        expected = {
            0: lambda t, v: t * v,
            1: lambda t, v: t - 5,
            2: lambda t, v: truncated(t, 7),
            3: lambda t, v: t ^ 0x55,
            4: lambda t, v: t << 33,
            5: lambda t, v: -t - 11 * truncated(-t, 11),
        }.get(v & 7, lambda t, v: t + (v & 0xFFFFFFFF).bit_count())(t, v)
        assert y[i] == (expected + 2**63) % 2**64 - 2**63, (i, v)


@pytest.fixture(scope="module")
def triton_gemm():
    """Compiles the textbook GEMM for sm_80: (element type) -> kernel, shared memory bytes."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.triton_gemm import gemm

    def compile_for(kind: str, sm: int = 80, tile: tuple[int, int, int] = (64, 64, 32)):
        types = dict.fromkeys("abc", f"*{kind}") | dict.fromkeys("MNK", "i32")
        constants = dict(zip(("BM", "BN", "BK"), tile, strict=True))
        source = ASTSource(
            gemm,
            signature={**types, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in range(6) if i != 3},
        )
        options = {"num_warps": 4, "num_stages": 3}
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        return load(compiled.asm["ptx"])["gemm"], compiled.metadata.shared

    return compile_for


@pytest.mark.parametrize("sm", [80, 120])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_triton_gemm(triton_gemm, kind: str, sm: int) -> None:
    """Ragged in M, several blocks; fp32 is computed in TF32."""
    kernel, shared = triton_gemm(kind, sm)
    m, n, k = 101, 96, 112
    a, b = RNG.standard_normal((m, k)), RNG.standard_normal((k, n))
    if kind == "bf16":
        a, b, c = as_bfloat(a), as_bfloat(b), np.full((m, n), 0x7FFF, np.uint16)
        wide, unit = from_bfloat, 2.0**-8
    else:
        dtype, unit = (np.float16, 2.0**-11) if kind == "fp16" else (np.float32, 0.0)
        a, b, c = a.astype(dtype), b.astype(dtype), np.full((m, n), np.nan, dtype)
        wide = lambda v: v.astype(np.float64)  # noqa: E731
    executed = kernel.run((2, 2), 128, [a, b, c, m, n, k], shared)
    assert executed["mma"] > 0
    assert executed["cp"] > 0
    exact = wide(a) @ wide(b)
    # TF32 keeps 10 bits, cut off: relative 2^-10 of each factor of each product.
    inputs = 2.0**-9 * (np.abs(wide(a)) @ np.abs(wide(b))) if kind == "fp32" else 1e-4
    assert (np.abs(wide(c) - exact) <= unit * np.abs(exact) + inputs).all()


def test_a_tile_of_128_by_128_takes_seconds(triton_gemm) -> None:
    kernel, shared = triton_gemm("fp16", 80, (128, 128, 32))
    a, b = (RNG.standard_normal((128, 128)).astype(np.float16) for _ in range(2))
    c = np.full((128, 128), np.nan, np.float16)
    start = time.process_time()
    kernel.run(1, 128, [a, b, c, 128, 128, 128], shared)
    seconds = time.process_time() - start
    exact = a.astype(np.float64) @ b
    assert (np.abs(c - exact) <= 2.0**-11 * np.abs(exact) + 1e-4).all()
    # About 0.5 s of one core; the bound is loose since the machine may be slow.
    assert seconds < 20


def test_triton_kernels_state_their_threads(triton_gemm) -> None:
    kernel, shared = triton_gemm("fp16")
    x = np.zeros((64, 64), np.float16)
    with pytest.raises(PtxError, match=r"requires \(128,\) threads"):
        kernel.run(1, 64, [x, x, x, 64, 64, 64], shared)
    with pytest.raises(PtxError, match=r"shared.*out of bounds"):
        kernel.run(1, 128, [x, x, x, 64, 64, 64], shared - 1024)
