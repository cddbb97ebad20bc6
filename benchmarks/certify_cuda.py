"""Certificates of the CUDA kernels: ``python -m benchmarks.certify_cuda [--write]``.

Builds the extension with CUDA, takes the machine code of every architecture out of it, and judges
each kernel (`fused_resnet.certify`). Beside that, the emulator executes the distinct layers of
ResNet-18 and ResNet-50 and counts bytes and bank conflicts. The result is compared with, or with
``--write`` replaces, ``benchmarks/certificates/cuda.json``. No GPU is needed, and none is used.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fused_resnet.backends.cuda_schedule import (
    GATHER_TILES,
    TILES,
    WIDE_GATHER_TILES,
    ConvSchedule,
    Tile,
)
from fused_resnet.certify import Certificate, certify_all, compare, load_json, table, to_json, tools
from fused_resnet.problem import ConvProblem

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "certificates" / "cuda.json"
CACHE = ROOT / ".cache" / "cuda"

#: Architectures of the wheels, as ``setup.py`` has them.
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

#: An arithmetic, and how its policy looks in a mangled name.
MATHS = {
    "float16": "TensorCoreMathI6__half",
    "bfloat16": "TensorCoreMathI13__nv_bfloat16",
    "tf32": "TensorCoreMathIf",
    "float32": "Float32Math",
}

#: (C, K, H = W, R = S, stride) of the distinct layers after the stem: ResNet-18, then ResNet-50.
LAYERS = (
    *((64, 64, 56, 3, 1), (64, 128, 56, 3, 2), (64, 128, 56, 1, 2), (128, 128, 28, 3, 1)),
    *((128, 256, 28, 3, 2), (128, 256, 28, 1, 2), (256, 256, 14, 3, 1), (256, 512, 14, 3, 2)),
    *((256, 512, 14, 1, 2), (512, 512, 7, 3, 1)),
    *((64, 64, 56, 1, 1), (64, 256, 56, 1, 1), (256, 64, 56, 1, 1), (256, 128, 56, 1, 1)),
    *((128, 128, 56, 3, 2), (128, 512, 28, 1, 1), (256, 512, 56, 1, 2), (512, 128, 28, 1, 1)),
    *((512, 256, 28, 1, 1), (256, 256, 28, 3, 2), (256, 1024, 14, 1, 1), (512, 1024, 28, 1, 2)),
    *((1024, 256, 14, 1, 1), (1024, 512, 14, 1, 1), (512, 512, 14, 3, 2), (512, 2048, 7, 1, 1)),
    *((1024, 2048, 14, 1, 2), (2048, 512, 7, 1, 1)),
)


@dataclass(frozen=True)
class Config:
    """A kernel as it is launched.

    Attributes:
        key: what the certificate calls it.
        pattern: what its mangled name matches.
        threads: of a block.
        shared: dynamic shared memory of a block, in bytes.
        archs: where it is launched; empty: everywhere.
    """

    key: str
    pattern: re.Pattern[str]
    threads: int
    shared: int
    archs: tuple[str, ...] = ()


def conv_config(
    name: str, arithmetic: str, tile: Tile, suffix: str = "", parameters: str = ""
) -> Config:
    """An implicit GEMM; ``parameters`` are what its mangled name has after the tile."""
    shape = rf"ConvTileILi{tile.pixels}ELi{tile.channels}E\w*EE{parameters}"
    pattern = re.compile(rf"{len(name)}{name}I\w*{MATHS[arithmetic]}\w*{shape}")
    wide = arithmetic == "float32" and tile.name != "64x64"
    key = f"{name} {arithmetic} {tile.name}{suffix}"
    return Config(key, pattern, 256 if wide else 128, tile.shared_bytes)


#: Architectures whose blocks may have 163 KiB of shared memory, and 227 KiB.
MEDIUM_SHARED, LARGE_SHARED = ("sm_80", "sm_90", "sm_100"), ("sm_90", "sm_100")

#: The chained bottlenecks, as ``ChainTiles`` of ``csrc/cuda/chain_args.h`` has them: what the
#: certificate calls it, its template arguments, shared bytes, and where it is launched.
CHAIN_TILES: tuple[tuple[str, tuple[int, ...], int, tuple[str, ...]], ...] = (
    ("64 resident next", (64, 64, 0, 1, 17), 165376, MEDIUM_SHARED),
    ("64 streamed next", (64, 64, 0, 1, 4), 58880, ()),
    ("64 resident last", (64, 0, 0, 1, 17), 165376, MEDIUM_SHARED),
    ("64 streamed last", (64, 0, 0, 1, 4), 58880, ()),
    ("64 resident wider", (64, 128, 0, 1, 25), 230912, LARGE_SHARED),
    ("64 streamed wider", (64, 128, 0, 1, 4), 58880, ()),
    ("64 resident projected", (64, 64, 64, 1, 25), 230912, LARGE_SHARED),
    ("64 streamed projected", (64, 64, 64, 1, 4), 58880, ()),
    ("128 streamed next", (128, 128, 0, 1, 3), 101376, ()),
    ("128 streamed last", (128, 0, 0, 1, 3), 101376, ()),
    ("128 streamed wider", (128, 256, 0, 1, 3), 101376, ()),
    ("128 streamed strided", (128, 128, 256, 2, 3), 91392, ()),
)


def chain_configs() -> Iterator[Config]:
    """The chained bottlenecks."""
    for arithmetic in ("float16", "bfloat16"):
        for kind, parameters, shared, archs in CHAIN_TILES:
            tile = "".join(f"Li{parameter}E" for parameter in parameters)
            pattern = re.compile(rf"16bottleneck_chainI\w*{MATHS[arithmetic]}\w*ChainTileI{tile}E")
            yield Config(f"bottleneck_chain {arithmetic} {kind}", pattern, 256, shared, archs)


def configs() -> Iterator[Config]:
    """Every kernel of the extension that multiplies."""
    yield from chain_configs()
    for arithmetic, math in MATHS.items():
        for tile in TILES:
            yield conv_config("conv_implicit_gemm", arithmetic, tile)
        name = "conv_implicit_gemm_gather"
        for tile in GATHER_TILES:
            yield conv_config(name, arithmetic, tile, "", "Li1ELb0E")
            if arithmetic in ("float16", "bfloat16"):
                yield conv_config(name, arithmetic, tile, " pairs", "Li2ELb0E")
        for tile in WIDE_GATHER_TILES:
            yield conv_config(name, arithmetic, tile, " wide", "Li1ELb1E")
        shared = 39296 if arithmetic in ("float16", "bfloat16") else 74112
        name = "conv_affine_relu_maxpool"
        for suffix, last in (("", "[^h]"), (" uint8", "h")):
            pattern = re.compile(rf"{len(name)}{name}I\w*{math}\w*{last}EEv")
            yield Config(f"stem {arithmetic}{suffix}", pattern, 160, shared)


def build(archs: Sequence[str]) -> Path:
    """The extension, compiled for these architectures; what has not changed is not compiled again.

    Raises:
        RuntimeError: it does not build; the message ends with what the compiler said.
    """
    folder = CACHE / "_".join(archs)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [
                *(sys.executable, "setup.py", "build_ext", "--force"),
                *("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "FUSED_RESNET_EXTENSION": "1",
                "FUSED_RESNET_CUDA": "1",
                "TORCH_CUDA_ARCH_LIST": " ".join(archs),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the extension does not build:\n{(done.stdout + done.stderr)[-4000:]}")
    return next((folder / "lib").rglob("_C*.so"))


def cubins(extension: Path) -> dict[str, list[bytes]]:
    """Machine code in a shared object, by architecture (``sm_80``)."""
    found: dict[str, list[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [tools.find("cuobjdump"), "-xelf", "all", extension.resolve()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for path in sorted(Path(folder).iterdir()):
            match, image = re.search(r"\.(sm_\d+)", path.name), path.read_bytes()
            # A file of host code only leaves an image without kernels.
            if match and b".text." in image:
                found.setdefault(match.group(1), []).append(image)
    return found


def certificates(extension: Path) -> dict[str, Certificate]:
    """The certificates of all kernels of an extension, by configuration and architecture.

    Raises:
        ValueError: a configuration has no kernel, or several.
    """
    result = {}
    for arch, images in cubins(extension).items():
        for config in configs():
            if config.archs and arch not in config.archs:
                continue
            matches = [
                certificate
                for image in images
                # A look at the names first: to read an image takes seconds.
                if config.pattern.search(image.decode("latin-1"))
                for name, certificate in _certified(image, config.threads, config.shared).items()
                if config.pattern.search(name)
            ]
            if len(matches) != 1:
                raise ValueError(f"{config.key} {arch}: {[c.kernel for c in matches]}")
            result[f"{config.key} {arch}"] = matches[0]
    return result


@functools.lru_cache(maxsize=256)
def _certified(image: bytes, threads: int, shared: int) -> dict[str, Certificate]:
    return certify_all(image, threads=threads, dynamic_shared=shared)


def layer(index: int, dtype: torch.dtype = torch.float16) -> ConvProblem:
    """A layer of ``LAYERS`` at 224x224, batch 1, with a residual."""
    c, k, h, r, stride = LAYERS[index]
    geometry = ((stride, stride), (r // 2, r // 2), (1, 1), 1)
    return ConvProblem(1, c, h, h, k, r, r, *geometry, "add_relu", dtype)


def traffic(index: int) -> dict[str, Any]:
    """What the emulator counts when it executes a layer, and how that compares with the minimum.

    ``activation_bytes`` are the distinct bytes of x and residual that are read, and of y that are
    written: what passes through memory if the caches hold what blocks share. ``l2_bytes`` are all
    bytes that the blocks ask for. ``conflicts`` are wavefronts over the least possible number.
    """
    from tests import cuda_emulated as emulated

    problem = layer(index)
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    p = problem
    run = emulated.Run(checked=True)
    tile = TILES[index % len(TILES)]
    emulated.conv(
        run,
        p,
        "float16",
        ConvSchedule(tile),
        draw(p.n, p.c, p.h, p.w).half(),
        draw(p.k, p.c, p.r, p.s).half(),
        draw(p.k),
        draw(p.k),
        draw(*p.out_shape).half(),
    )
    (report,) = run.reports
    report.raise_findings()
    buffers = report.buffers
    moved = sum(b.unique_bytes_read + b.unique_bytes_written for b in buffers.values())
    weights = sum(buffers[name].unique_bytes_read for name in ("weight", "scale", "shift"))
    least = p.min_bytes - 2 * p.k * p.c * p.r * p.s - 8 * p.k
    if p.r == 1 and p.stride[0] > 1:
        # Of x only the pixels under the stride are ever asked for.
        out = p.out_shape[2] * p.out_shape[3]
        least -= 2 * p.n * p.c * (p.h * p.w - out)
    kinds = ("ldmatrix", "shared_load", "shared_store", "cp_async")
    return {
        "layer": str(p),
        "tile": tile.name,
        "activation_bytes": moved - weights,
        "least_activation_bytes": least,
        "l2_bytes": sum(b.bytes_read + b.bytes_written for b in buffers.values()),
        "conflicts": {kind: report.conflicts(kind) for kind in kinds},
    }


@dataclass(frozen=True)
class ChainCase:
    """A chained bottleneck as the emulator counts it: an image of ``size`` x ``size`` pixels.

    ``size`` is that of ``out``. ``way`` is as `tests.cuda_emulated.plan_chain` has it, ``options``
    are those of `tests.chain_cases.chain_problem`. ``blocks`` are so many that each computes about
    as many tiles as at batch 32 on an A100.
    """

    mid: int
    way: str
    size: int
    blocks: int
    options: tuple[tuple[str, Any], ...] = ()


_PROJECTED, _STRIDED = (("proj", 64),), (("proj", 256), ("stride", 2), ("step", 1))

#: The blocks of ResNet-50's first two stages: inner ones, last ones, first ones.
CHAINS = (
    ChainCase(64, "resident", 56, 4),
    ChainCase(64, "streamed", 56, 4),
    ChainCase(128, "streamed", 28, 3),
    ChainCase(64, "resident", 56, 4, (("following", 128), ("store", "even"))),
    ChainCase(64, "streamed", 56, 4, (("following", 128), ("store", "even"))),
    ChainCase(128, "streamed", 28, 3, (("following", 256), ("store", "even"))),
    ChainCase(64, "resident", 56, 4, _PROJECTED),
    ChainCase(64, "streamed", 56, 4, _PROJECTED),
    ChainCase(128, "streamed", 28, 3, _STRIDED),
)


def chain_traffic(case: ChainCase) -> dict[str, Any]:
    """Bytes for each pixel of ``out`` that the emulator counts as it executes a chained bottleneck.

    ``dram`` are distinct bytes of activations, ``l2`` all bytes of activations and weights that
    blocks ask for. ``triton_l2``, the same of the Triton kernel, is reckoned: a program of 128
    pixels reads all weights, and each pixel 9 M channels for the 3x3 and, once, its residual, out
    and mid_next. Scales and shifts, a few KB, are left out of both: they stay in L1.
    """
    from tests import cuda_emulated as emulated
    from tests.chain_cases import chain_data, chain_problem

    run = emulated.Run(checked=True)
    m, pixels = case.mid, case.size**2
    options = dict(case.options)
    side = case.size * options.get("stride", 1)
    problem = chain_problem(m, 1, side, side, **options)
    emulated.bottleneck_chain(run, problem, case.way, case.blocks, *chain_data(problem))
    (report,) = run.reports
    report.raise_findings()
    buffers = report.buffers
    activations = [buffers[name] for name in ("mid1", "residual", "out", "mid_next")]
    moved = sum(b.unique_bytes_read + b.unique_bytes_written for b in activations)
    weights = [b for name, b in buffers.items() if name.startswith("weight")]
    asked = sum(b.bytes_read + b.bytes_written for b in (*activations, *weights))
    kinds = ("ldmatrix", "cp_async")
    out = prod(problem.out_shape) / pixels
    once = (problem.proj or problem.k) + out + problem.next
    parameters = 9 * m * m + problem.k * (m + problem.proj + problem.next)
    return {
        "kernel": report.kernel,
        "dram": moved / pixels,
        "least_dram": 2 * (prod((m, side, side)) / pixels + once),
        "l2": round(asked / pixels, 1),
        "triton_l2": 2 * (parameters / 128 + 9 * m + once),
        "conflicts": {kind: report.conflicts(kind) for kind in kinds},
    }


def toolchain() -> dict[str, str]:
    """The compiler that made the machine code."""
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return {"nvcc": re.findall(r"V([\d.]+)", done.stdout)[0]}


def document(found: dict[str, Certificate], layers: Sequence[int]) -> dict[str, Any]:
    """The file's contents: certificates, and what the emulator counted of layers and chains."""
    contents: dict[str, Any] = json.loads(to_json(found, toolchain()))
    contents["emulated"] = {str(index): traffic(index) for index in layers}
    contents["emulated_chains"] = [chain_traffic(case) for case in CHAINS]
    return contents


def worse_traffic(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Layers of ``now`` that move more, or meet more conflicts, than the committed ones."""
    found = []
    for index, new in now["emulated"].items():
        old = committed["emulated"][index]
        figures = {name: (old[name], new[name]) for name in ("activation_bytes", "l2_bytes")}
        for kind, ratio in new["conflicts"].items():
            figures[f"{kind} conflicts"] = (old["conflicts"][kind], ratio)
        found += [
            f"{new['layer']}: {name} was {before}, is {after}"
            for name, (before, after) in figures.items()
            if after > before
        ]
    return found


def worse_chains(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Chained bottlenecks of ``now`` that move more than the committed ones."""
    before = {chain["kernel"]: chain for chain in committed["emulated_chains"]}
    return [
        f"{chain['kernel']}: {name} was {before[chain['kernel']][name]}, is {chain[name]}"
        for chain in now["emulated_chains"]
        for name in ("dram", "l2")
        if chain[name] > before[chain["kernel"]][name]
    ]


def main() -> int:
    """The command line; 1 if a figure is worse than the committed one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"replace {COMMITTED.name}")
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="as in TORCH_CUDA_ARCH_LIST")
    options = parser.parse_args()
    found = certificates(build(options.archs))
    Console(width=200).print(table(found, "CUDA kernels"))
    now = document(found, range(len(LAYERS)))
    if options.write:
        COMMITTED.parent.mkdir(parents=True, exist_ok=True)
        COMMITTED.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return 0
    committed = load_json(COMMITTED)
    partial = len(options.archs) < len(ARCHS)
    problems = [str(w) for w in compare(committed, now, partial=partial)]
    problems += worse_traffic(committed, now) + worse_chains(committed, now)
    print("\n".join(problems) or "no figure is worse than the committed one")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
