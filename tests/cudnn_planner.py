"""Run with the stub driver: plans of cuDNN for one GPU, as JSON lines on standard output.

``python -m tests.cudnn_planner 90 bfloat16 32 [--few]``: a line for every distinct layer of
ResNet-18 and ResNet-50 in that dtype and batch, each compiled. With --few, every epilogue of one
layer, a grouped convolution and the stem, and only the first is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import cudnn
import torch

from fused_resnet.backends.cudnn_graph import Numerics, PlannedGraph
from fused_resnet.backends.triton_.certify import resnet_problems
from fused_resnet.problem import EPILOGUES, ConvProblem


def gpu(
    name: str, capability: int, sms: int, shared: int, l2_mb: int, memory_gb: int, clock: int,
    memory_clock: int,
) -> dict[str, Any]:  # fmt: skip
    """A GPU in the words of cuDNN's heuristics; sizes from the vendor's data sheets."""
    return {
        "deviceName": name, "deviceVer": 10 * capability, "multiProcessorCount": sms,
        "maxSharedMemoryPerBlockOptin": shared, "l2CacheSize": l2_mb << 20,
        "totalGlobalMem": memory_gb << 30, "smClockRateKHz": clock, "memClockRateKHz": memory_clock,
        "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
        "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 49152,
        "reservedSharedMemoryPerBlock": 1024, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": 2048, "warpSize": 32, "smCountOrigin": 0, "supportCoopLaunch": 1,
        "isTccDriver": 0, "pciDeviceId": 0, "cudaDeviceId": 0, "driverVer": 13000,
    }  # fmt: skip


GPUS = {
    80: gpu("NVIDIA A100-SXM4-80GB", 80, 108, 166912, 40, 80, 1410000, 1593000),
    90: gpu("NVIDIA H100 80GB HBM3", 90, 132, 232448, 50, 80, 1980000, 2619000),
    100: gpu("NVIDIA B200", 100, 148, 232448, 126, 180, 1965000, 3996000),
}


def layers(dtype: torch.dtype, n: int) -> list[ConvProblem]:
    """The distinct convolutions of both networks, but for those that are pooled."""
    every = [p for depth in (18, 50) for p in resnet_problems(depth, n, dtype)]
    return list(dict.fromkeys(p for p in every if p.pool is None))


def few(dtype: torch.dtype, n: int) -> list[ConvProblem]:
    """A 3x3 convolution with every epilogue, one of 32 groups (ResNeXt-50's), and the stem."""
    one = ConvProblem(n, 128, 28, 28, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, "none", dtype)
    grouped = dataclasses.replace(one, h=56, w=56, groups=32)
    stem = next(p for p in layers(dtype, n) if p.c == 3)
    return [*(dataclasses.replace(one, epilogue=e) for e in EPILOGUES), grouped, stem]


def main(capability: int, dtype: str, n: int, all_layers: bool) -> None:
    where = {
        "device_property": cudnn.create_device_properties(json.dumps(GPUS[capability])),
        "sm_version": capability,
    }
    problems = (layers if all_layers else few)(getattr(torch, dtype), n)
    for i, problem in enumerate(problems):
        graph = PlannedGraph(problem, Numerics(tf32=True, deterministic=False), **where)
        found: dict[str, Any] = {"problem": str(problem), "plans": graph.plans}
        if all_layers or i == 0:
            found["built"] = graph.first()
            found["workspace"] = graph.workspace(found["built"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "--few" not in sys.argv)
