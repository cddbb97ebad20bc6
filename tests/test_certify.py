"""The certifier against kernels whose machine code is known beforehand."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from fused_resnet.certify import (
    ARCHS,
    DEVICES,
    Certificate,
    Work,
    arch,
    bound,
    certificates_of,
    certify,
    certify_all,
    certify_triton,
    compare,
    load_json,
    occupancy,
    parse_ptxas,
    table,
    to_json,
    tools,
)
from fused_resnet.certify.model import main_loop
from fused_resnet.certify.sass import parse
from tests.nvcc import compile_cuda, needs_nvcc

KERNELS = r"""
#include <cstdint>
__device__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 64 live accumulators, but only 32 registers a thread.
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y, int n) {
  float acc[64];
#pragma unroll
  for (int i = 0; i < 64; i++) acc[i] = x[threadIdx.x * 64 + i];
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] = acc[i] * acc[(i + 1) % 64] + x[k];
#pragma unroll
  for (int i = 0; i < 64; i++) y[threadIdx.x * 64 + i] = acc[i];
}

extern "C" __global__ void copy2(const short* x, short* y) { y[threadIdx.x] = x[threadIdx.x]; }

extern "C" __global__ void copy16(const int4* x, int4* y) { y[threadIdx.x] = x[threadIdx.x]; }

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void load4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared(p)) : "memory");
}

// Each step: two 512-byte fragments by ldmatrix, one 16-byte copy a thread, two mma.
template <bool ASYNC> __device__ void mma_loop(const uint4* x, float* y, int n) {
  __shared__ uint4 tile[2][128];
  float d[2][4] = {};
#pragma unroll 1
  for (int k = 0; k < n; k++) {
    uint4* next = &tile[k & 1][threadIdx.x];
    if (ASYNC) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(next)),
                   "l"(x + k * 128 + threadIdx.x) : "memory");
      asm volatile("cp.async.commit_group;" ::: "memory");
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      *next = x[k * 128 + threadIdx.x];
    }
    __syncthreads();
    uint32_t a[4], b[4];
    load4(a, &tile[k & 1][threadIdx.x & 31]);
    load4(b, &tile[k & 1][64 + (threadIdx.x & 31)]);
    mma(d[0], a, b[0], b[1]);
    mma(d[1], a, b[2], b[3]);
  }
  for (int i = 0; i < 8; i++) y[threadIdx.x * 8 + i] = d[i / 4][i % 4];
}
extern "C" __global__ void mma_async(const uint4* x, float* y, int n) { mma_loop<true>(x, y, n); }
extern "C" __global__ void mma_plain(const uint4* x, float* y, int n) { mma_loop<false>(x, y, n); }

extern "C" __global__ void mma_dividing(float* y, int n, int c) {
  float d[4] = {};
#pragma unroll 1
  for (int k = 0; k < n; k++) {
    uint32_t q = k / c, a[4] = {q, q, q, q};
    mma(d, a, q, q);
  }
  for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
}

extern "C" __global__ void fp32_loop(const float* x, float* y, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x % 64] = x[threadIdx.x];
  __syncthreads();
  float acc[16] = {};
#pragma unroll 1
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = 0; i < 16; i++) acc[i] += tile[k + i / 4] * tile[k + 32 + i % 4];
  for (int i = 0; i < 16; i++) y[threadIdx.x * 16 + i] = acc[i];
}

extern "C" __global__ void __launch_bounds__(1024) dynamic(float* y) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[1023 - threadIdx.x];
}
"""

WGMMA = r"""
#include <cstdint>
template <int PENDING>
__device__ void run(float* out, uint64_t a, uint64_t b, int n) {
  float d[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b + i));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}
#define ARGS float *out, uint64_t a, uint64_t b, int n
extern "C" __global__ void wgmma_in_flight(ARGS) { run<1>(out, a, b, n); }
extern "C" __global__ void wgmma_drained(ARGS) { run<0>(out, a, b, n); }
"""


def kernel(name: str, sm: int = 80, threads: int = 128, **options: object) -> Certificate:
    cubin, log = compile_cuda(KERNELS, "cubin", f"sm_{sm}", "-Xptxas", "-v")
    return certify(cubin, kernel=name, threads=threads, ptxas_log=log, **options)


@needs_nvcc
@pytest.mark.parametrize("sm", [80, 90])
def test_spills_are_seen(sm: int) -> None:
    spilling = kernel("spilling", sm, threads=1024)
    assert spilling.spills
    assert spilling.registers == 32
    assert spilling.local_loads > 0
    assert spilling.local_stores > 0
    assert spilling.ptxas is not None
    assert spilling.ptxas.spill_store_bytes > 0
    assert spilling.ptxas.stack_bytes == spilling.stack_bytes
    clean = kernel("mma_async", sm)
    assert not clean.spills
    assert (clean.local_loads, clean.local_stores, clean.local_bytes) == (0, 0, 0)
    assert clean.ptxas is not None
    assert clean.ptxas.spill_store_bytes == clean.ptxas.spill_load_bytes == 0
    assert clean.ptxas.registers == clean.registers


@needs_nvcc
@pytest.mark.parametrize("sm", [80, 90])
def test_widths_of_global_accesses(sm: int) -> None:
    narrow, wide, asynchronous = (kernel(n, sm) for n in ("copy2", "copy16", "mma_async"))
    assert narrow.widths("LDG") == narrow.widths("STG") == (2,)
    assert wide.widths("LDG") == wide.widths("STG") == (16,)
    assert asynchronous.widths("LDGSTS", loop=True) == (16,)
    assert asynchronous.widths("STG", loop=True) == ()


@needs_nvcc
@pytest.mark.parametrize("sm", [80, 90])
def test_asynchronous_copies_in_the_main_loop(sm: int) -> None:
    with_copies, without = kernel("mma_async", sm), kernel("mma_plain", sm)
    assert with_copies.async_in_loop
    assert with_copies.async_copies == ("LDGSTS",)
    assert not without.async_in_loop
    assert without.async_copies == ()
    assert without.loop is not None
    assert without.loop.tensor


@needs_nvcc
def test_main_loop_of_mma_on_sm_80() -> None:
    certificate = kernel("mma_async")
    assert certificate.tensor_kind == "mma.sync"
    assert [str(op) for op in certificate.tensor] == ["mma.sync m16n8k16 f16 x2"]
    loop = certificate.loop
    assert loop is not None
    classes = dict(loop.classes)
    assert classes["tensor"] == 2
    assert classes["load_matrix"] == 2
    assert classes["async_copy"] == 1
    assert sum(classes.values()) == loop.instructions == loop.issue_cycles
    # Two products of 16*8*16 on each of four sub-partitions, 1024 an SM and clock.
    assert loop.tensor_cycles == 2 * 4 * 16 * 8 * 16 / 1024
    # Two fragments and one copy, 512 bytes each, of four warps, 128 bytes a clock.
    assert loop.smem_cycles == 3 * 4 * 512 / 128
    assert loop.share == pytest.approx(16 / max(16, 48, loop.instructions))
    assert loop.limiter == "smem"
    assert loop.inner_loops == 0
    assert loop.divisions == 0
    assert loop.wgmma_waited_at_once is None


@needs_nvcc
def test_mma_sync_does_not_reach_the_rate_of_wgmma() -> None:
    loop = kernel("mma_async", 90).loop
    assert loop is not None
    ideal = 2 * 4 * 16 * 8 * 16 / 2048
    assert loop.tensor_cycles == pytest.approx(ideal / 0.62)
    assert loop.share == pytest.approx(ideal / max(48, loop.issue_cycles))


@needs_nvcc
def test_divisions_in_the_loop_are_seen() -> None:
    loop = kernel("mma_dividing").loop
    assert loop is not None
    assert loop.divisions > 0


@needs_nvcc
@pytest.mark.parametrize(("sm", "cycles"), [(80, 16 * 32 * 4 / 64), (90, 16 * 32 * 4 / 128)])
def test_a_loop_without_tensor_instructions_is_judged_by_fp32(sm: int, cycles: float) -> None:
    certificate = kernel("fp32_loop", sm)
    assert certificate.tensor_kind == "fp32"
    loop = certificate.loop
    assert loop is not None
    assert dict(loop.classes)["fma_fp32"] == 16
    assert loop.tensor_cycles == cycles


@needs_nvcc
@pytest.mark.parametrize("sm", [80, 90])
def test_shared_memory(sm: int) -> None:
    """cuobjdump counts the system's kilobyte on sm_90; a certificate does not."""
    assert kernel("mma_async", sm).static_shared == 2 * 128 * 16
    assert kernel("copy16", sm).static_shared == 0
    dynamic = kernel("dynamic", sm, threads=1024, dynamic_shared=4096)
    assert (dynamic.static_shared, dynamic.dynamic_shared, dynamic.shared) == (0, 4096, 4096)
    assert dynamic.fits
    limit = arch(sm).shared_per_block
    assert kernel("dynamic", sm, dynamic_shared=limit).fits
    too_much = kernel("dynamic", sm, dynamic_shared=limit + 1)
    assert not too_much.fits
    assert too_much.occupancy.limiter == "shared"


@needs_nvcc
def test_wgmma_waited_for_at_once() -> None:
    cubin, _ = compile_cuda(WGMMA, "cubin", "sm_90a")
    found = certify_all(cubin, threads=128)
    in_flight, drained = found["wgmma_in_flight"].loop, found["wgmma_drained"].loop
    assert in_flight is not None
    assert drained is not None
    assert in_flight.wgmma_waited_at_once is False
    assert drained.wgmma_waited_at_once is True
    assert [str(op) for op in in_flight.tensor] == ["wgmma m64n8k16 f16 x1"]
    assert in_flight.tensor_cycles == 64 * 8 * 16 / 2048
    # A (64x16) and B (8x16) are read from shared memory, two bytes an element.
    assert in_flight.smem_cycles == (64 + 8) * 16 * 2 / 128


@needs_nvcc
def test_choosing_a_kernel() -> None:
    cubin, _ = compile_cuda(KERNELS, "cubin", "sm_80", "-Xptxas", "-v")
    with pytest.raises(ValueError, match=r"'mma_' matches .*mma_async.*mma_plain"):
        certify(cubin, threads=128, kernel="mma_")
    with pytest.raises(ValueError, match="'absent' matches"):
        certify(cubin, threads=128, kernel="absent")


def test_not_a_cubin() -> None:
    with pytest.raises(ValueError, match="nvdisasm failed"):
        certify(b"nothing", threads=32)


def test_triton_kernels_of_three_generations(triton_gemm: dict[int, Certificate]) -> None:
    kinds = {sm: str(c.loop.tensor[0]) for sm, c in triton_gemm.items() if c.loop}
    assert kinds == {
        80: "mma.sync m16n8k16 f16 x64",
        90: "wgmma m64n256k16 f16 x4",
        100: "tcgen05 m128n256k16 f16 x4",
    }
    for sm, certificate in triton_gemm.items():
        assert certificate.async_in_loop
        assert certificate.widths("LDGSTS", loop=True) == (16,)
        assert certificate.widths("STG") == (16,)
        assert not certificate.spills
        assert certificate.fits
        assert certificate.dynamic_shared > 0
        loop = certificate.loop
        assert loop is not None
        # Cycles of the tile at the device's full rate; two warpgroups share sm_90's tile.
        tile = {
            80: 128 * 128 * 32 / 1024,
            90: 128 * 256 * 64 / 2048 / 2,
            100: 128 * 256 * 64 / 4096,
        }
        assert loop.tensor_cycles == tile[sm]
        assert loop.wgmma_waited_at_once is (False if sm == 90 else None)
    shares = {sm: c.share for sm, c in triton_gemm.items()}
    # sm_100: operand reads and cp.async writes take 96 cycles each, every 128 cycles of tcgen05.
    assert shares == {80: 1.0, 90: 1.0, 100: pytest.approx(128 / 192)}


@pytest.fixture(scope="module")
def triton_gemm() -> dict[int, Certificate]:
    """A textbook GEMM of Triton, compiled ahead of time."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.triton_gemm import gemm

    types = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
    tiles = {80: (128, 128, 32, 4), 90: (128, 256, 64, 8), 100: (128, 256, 64, 8)}
    found = {}
    for sm, (bm, bn, bk, warps) in tiles.items():
        constants = {"BM": bm, "BN": bn, "BK": bk}
        source = ASTSource(
            gemm,
            signature={**types, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", sm, 32),
            options={"num_warps": warps, "num_stages": 3},
        )
        found[sm] = certify_triton(compiled)
        assert found[sm].threads == 32 * warps
    return found


LOOPS = """
	.target	sm_80
	.section	.text.nested,"ax",@progbits
nested:
.text.nested:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_outer:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_inner:
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/              @!P0 BRA `(.L_retry) ;
.L_back:
        /*0040*/              @!P1 CALL.REL.NOINC `(.L_left) ;
        /*0050*/                   BRA `(.L_inner) ;
.L_left:
        /*0060*/               @P2 BRA `(.L_outer) ;
        /*0070*/                   EXIT ;
.L_retry:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0090*/              @!P0 BRA `(.L_retry) ;
        /*00a0*/                   BRA `(.L_back) ;
.L_trap:
        /*00b0*/                   BRA `(.L_trap);
"""


def test_loops_follow_control_flow_not_layout() -> None:
    """The retry block lies behind EXIT, yet belongs to both loops; a CALL leaves the inner one."""
    sm, programs = parse(LOOPS)
    assert sm == 80
    retry, inner, outer = programs["nested"].loops
    assert retry.body == (8, 9)
    assert inner.body == (2, 3, 4, 5, 8, 9, 10)
    assert outer.body == (1, 2, 3, 4, 5, 6, 8, 9, 10)


def test_ptxas_output() -> None:
    log = """ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers"""
    report = parse_ptxas(log)["f"]
    assert dataclasses.astuple(report) == (24, 16, 8, 40)
    assert parse_ptxas("") == {}


OCCUPANCY = r"""
#include "cuda_occupancy.h"
#include <cstdio>
int main() {
  cudaOccDeviceProp p = {};
  int sm, warps, threads, registers;
  size_t per_sm, per_block, reserved, shared;
  p.maxThreadsPerBlock = 1024;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.numSms = 1;
  while (scanf("%d %d %zu %zu %zu %d %d %zu", &sm, &warps, &per_sm, &per_block, &reserved, &threads,
               &registers, &shared) == 8) {
    p.computeMajor = sm / 10, p.computeMinor = sm % 10;
    p.maxThreadsPerMultiprocessor = 32 * warps;
    p.sharedMemPerMultiprocessor = per_sm;
    p.sharedMemPerBlockOptin = per_block;
    p.sharedMemPerBlock = 49152;
    p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes f = {};
    f.maxThreadsPerBlock = 1024;
    f.numRegs = registers;
    f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = per_block;
    cudaOccDeviceState s = {};
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r = {};
    cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared);
    printf("%d\n", e == CUDA_OCC_SUCCESS ? r.activeBlocksPerMultiprocessor : -e);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_occupancy_agrees_with_the_vendors_calculator(tmp_path: Path) -> None:
    include = tools.find("nvdisasm").parents[1] / "include"
    if not (include / "cuda_occupancy.h").is_file():
        pytest.skip("cuda_occupancy.h is not beside nvdisasm")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run(["g++", f"-I{include}", source, "-o", program], check=True)
    cases = [
        (arch(sm), threads, registers, shared)
        for sm in ARCHS
        for threads in (32, 96, 128, 256, 384, 1024)
        for registers in (16, 32, 40, 64, 97, 128, 168, 200, 255)
        for shared in (0, 1, 1000, 16384, 49152, 50000, 65536, 98304, 101376)
        if shared <= arch(sm).shared_per_block
    ]
    lines = "\n".join(
        f"{a.sm} {a.max_warps} {a.shared_per_sm} {a.shared_per_block} {a.shared_reserved} "
        f"{threads} {registers} {shared}"
        for a, threads, registers, shared in cases
    )
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    expected = list(map(int, done.stdout.split()))
    got = [
        occupancy(a, threads=threads, registers=registers, shared=shared).blocks
        for a, threads, registers, shared in cases
    ]
    different = [c for c, e, g in zip(cases, expected, got, strict=True) if e != g]
    assert different == []
    assert min(expected) == 0
    assert max(expected) == 32


def test_occupancy_names_what_limits() -> None:
    a100 = arch(80)
    assert occupancy(a100, threads=128, registers=250, shared=0).limiter == "registers"
    assert occupancy(a100, threads=128, registers=32, shared=49152).limiter == "shared"
    assert occupancy(a100, threads=1024, registers=16, shared=0).limiter == "warps"
    assert occupancy(a100, threads=32, registers=16, shared=0).limiter == "blocks"
    with pytest.raises(ValueError, match="threads per block"):
        occupancy(a100, threads=1025, registers=16, shared=0)


def test_unknown_architectures_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="sm_42"):
        arch(42)


def test_rates_are_those_of_the_devices_peaks() -> None:
    """Peak = SMs * boost clock * 2 * rate, with the clocks that NVIDIA states (GHz)."""
    clocks = {"A100": 1.41, "H100": 1.83, "B200": 1.85}
    for device in DEVICES:
        limits = arch(device.sm)
        for kind, rate in (("f16", limits.tensor_f16), ("tf32", limits.tensor_tf32)):
            peak = device.sms * clocks[device.name] * 1e9 * 2 * rate
            assert peak == pytest.approx(device.flops[kind], rel=0.01)


def test_roofline() -> None:
    a100 = DEVICES[0]
    memory = bound(Work(flops=312 * 10**6, bytes=2039 * 10**4), a100)
    assert memory.limiter == "memory"
    assert memory.predicted_us == memory.memory_us == pytest.approx(10.0)
    assert memory.compute_us == pytest.approx(1.0)
    half = bound(Work(flops=312 * 10**7, bytes=8, kind="f16"), a100, share=0.5)
    assert (half.limiter, half.predicted_us) == ("compute", pytest.approx(20.0))
    with pytest.raises(ValueError, match="share"):
        bound(Work(1, 1), a100, share=0)
    with pytest.raises(ValueError, match="kind"):
        Work(1, 1, "int8")


@needs_nvcc
def test_bounds_are_for_the_devices_of_the_architecture() -> None:
    certificate = kernel("mma_async", 90, work=Work(flops=10**9, bytes=10**6))
    (only,) = certificate.bounds
    assert only.device == "H100"
    assert certificate.share is not None
    assert only.compute_us == pytest.approx(1e9 / 989.4e12 * 1e6 / certificate.share)


@pytest.fixture(scope="module")
def documents() -> tuple[dict[str, Certificate], dict[str, object]]:
    names = ("mma_async", "mma_plain", "copy16")
    certificates = {
        f"{name} sm_{sm}": kernel(name, sm, work=Work(10**9, 10**6))
        for name in names
        for sm in (90, 80)
    }
    return certificates, json.loads(to_json(certificates, {"nvcc": "13.0"}))


@needs_nvcc
def test_json_is_stable_and_complete(documents, tmp_path: Path) -> None:
    certificates, document = documents
    text = to_json(certificates, {"nvcc": "13.0"})
    backwards = dict(reversed(certificates.items()))
    assert to_json(backwards, {"nvcc": "13.0"}) == text
    path = tmp_path / "certificates.json"
    path.write_text(text)
    assert load_json(path) == document
    entry = document["certificates"]["mma_async sm_80"]
    assert entry["registers"] == certificates["mma_async sm_80"].registers
    assert entry["tensor"] == ["mma.sync m16n8k16 f16 x2"]
    assert entry["loop"]["classes"]["tensor"] == 2
    assert entry["bounds"][0]["predicted_us"] > 0
    assert "predicted" in document["label"]
    # One line a certificate, and every figure of it is read back.
    assert len([line for line in text.splitlines() if "registers" in line]) == len(certificates)
    assert to_json(certificates_of(document), {"nvcc": "13.0"}) == text
    back = certificates_of(document)["mma_async sm_80"]
    assert back.tensor == certificates["mma_async sm_80"].tensor
    assert back.widths("LDGSTS") == certificates["mma_async sm_80"].widths("LDGSTS") != ()
    path.write_text("[]")
    with pytest.raises(ValueError, match="no certificates"):
        load_json(path)


CHANGES = [
    ("registers", ("registers",), 1),
    ("local_loads", ("local_loads",), 1),
    ("spill_store_bytes", ("ptxas", "spill_store_bytes"), 4),
    ("shared_bytes", ("static_shared",), 16),
    ("loop.instructions", ("loop", "instructions"), 1),
    ("loop.smem_cycles", ("loop", "smem_cycles"), 0.5),
    ("loop.divisions", ("loop", "divisions"), 1),
    ("occupancy.blocks", ("occupancy", "blocks"), -1),
    ("loop.share", ("loop", "share"), -0.001),
    ("narrowest LDGSTS", ("global_access", 0, "bytes"), -8),
    ("narrowest LDGSTS in loop", ("loop", "global_access", 0, "bytes"), -8),
]


@needs_nvcc
@pytest.mark.parametrize(("figure", "path", "change"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_worse_figure_is_reported_and_a_better_one_is_not(
    documents, figure: str, path: tuple[str | int, ...], change: float
) -> None:
    _, committed = documents
    now = json.loads(json.dumps(committed))
    entry = now["certificates"]["mma_async sm_80"]
    for step in path[:-1]:
        entry = entry[step]
    entry[path[-1]] += change
    assert compare(committed, committed) == []
    (worse,) = compare(committed, now)
    assert (worse.key, worse.figure) == ("mma_async sm_80", figure)
    assert f"mma_async sm_80: {figure} was" in str(worse)
    assert compare(now, committed) == []


@needs_nvcc
def test_lost_properties_are_reported(documents) -> None:
    _, committed = documents
    now = json.loads(json.dumps(committed))
    entries = now["certificates"]
    entries["mma_async sm_80"]["loop"]["async_copies"] = []
    entries["mma_async sm_90"]["tensor"] = ["wgmma m64n8k16 f16 x2"]
    entries["mma_plain sm_80"]["loop"] = None
    entries["mma_plain sm_90"]["loop"]["share"] = None
    entries["copy16 sm_90"]["ptxas"] = None
    del entries["copy16 sm_80"]
    worse = {(w.key, w.figure) for w in compare(committed, now)}
    assert worse == {
        ("mma_async sm_80", "loop.has_async_copies"),
        ("mma_async sm_90", "tensor instruction"),
        ("mma_plain sm_80", "loop found"),
        ("mma_plain sm_80", "loop.share"),
        ("mma_plain sm_90", "loop.share"),
        ("copy16 sm_90", "spill_load_bytes"),
        ("copy16 sm_90", "spill_store_bytes"),
        ("copy16 sm_80", "certificate"),
    }
    assert ("copy16 sm_80", "certificate") not in {
        (w.key, w.figure) for w in compare(committed, now, partial=True)
    }


@needs_nvcc
def test_table_labels_what_is_predicted(documents) -> None:
    certificates, _ = documents
    console = Console(file=io.StringIO(), width=300)
    console.print(table(certificates))
    text = console.file.getvalue()
    assert "predicted share" in text
    assert "no GPU ran" in text
    (line,) = [row for row in text.splitlines() if "mma_async sm_80" in row]
    assert "mma.sync m16n8k16 f16 x2" in line
    assert "LDGSTS 16" in line
    assert "A100" in line


TCGEN05 = """
	.target	sm_100a
	.section	.text.pair,"ax",@progbits
pair:
.L_loop:
        /*0010*/                   UMOV UR39, {descriptor} ;
        /*0020*/                   UTCHMMA gdesc[UR14], gdesc[UR4], tmem[UR33], tmem[UR38], idesc[UR39], UPT ;
        /*0030*/              @!P0 BRA `(.L_loop) ;
        /*0040*/                   EXIT ;
"""  # noqa: E501


@pytest.mark.parametrize(
    ("descriptor", "text", "cycles"),
    [
        # Fields as the PTX ISA gives them: D is fp32 (bit 4), the type of A, N / 8, M / 16.
        (1 << 4 | 0 << 7 | 32 << 17 | 8 << 24, "m128n256k16 f16", 128 * 256 * 16 / 4096),
        (1 << 4 | 1 << 7 | 16 << 17 | 4 << 24, "m64n128k16 bf16", 64 * 128 * 16 / 2048),
        (1 << 4 | 2 << 7 | 32 << 17 | 8 << 24, "m128n256k8 tf32", 128 * 256 * 8 / 2048),
    ],
)
def test_tcgen05_shapes_come_from_the_descriptor(descriptor: int, text: str, cycles: float) -> None:
    _, programs = parse(TCGEN05.format(descriptor=hex(descriptor)))
    loop = main_loop(programs["pair"], arch(100), warps=4)
    assert loop is not None
    assert str(loop.tensor[0]) == f"tcgen05 {text} x1"
    assert loop.tensor_cycles == cycles


def test_a_product_shared_by_two_sms_is_not_modelled() -> None:
    pair = hex(1 << 4 | 32 << 17 | 16 << 24)
    _, programs = parse(TCGEN05.format(descriptor=pair))
    loop = main_loop(programs["pair"], arch(100), warps=4)
    assert loop is not None
    assert (loop.tensor_cycles, loop.share, loop.limiter) == (None, None, None)
    assert str(loop.tensor[0]) == "tcgen05 f16 x1"
