"""Certificates of the Triton backend: compile every launch for every GPU and judge the code.

    python -m benchmarks.certify_triton [--arch 80 90] [--dtype float16] [--batch 1] [--jobs 2]
        [--kind conv chain] [--out FOLDER]

Needs no GPU, and times nothing: all that it says of speed is *predicted*. Prints one line for each
kernel and GPU; the exit status says whether all keep the promises of the space of configurations.
Without a selection it writes ``benchmarks/certificates/triton.json``, ``triton_chain.json`` and the
page docs/certificates.md; a selection goes to a folder of its own (``--out``) or nowhere. Compiled
kernels are cached by Triton, so that a second run is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track

from benchmarks import certificate_tables
from fused_resnet.backends.triton_.certify import (
    Case,
    cases,
    certify_case,
    chain_cases,
    complaints,
    name_of,
    summary,
)
from fused_resnet.backends.triton_.config import ARCHS
from fused_resnet.certify import Certificate, to_json

FILES = {"conv": certificate_tables.CONV, "chain": certificate_tables.CHAIN}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Selection = tuple[str, tuple[int, ...], tuple[str, ...], tuple[int, ...]]


@lru_cache(maxsize=1)
def selected(
    kind: str, archs: tuple[int, ...], dtypes: tuple[str, ...], batches: tuple[int, ...]
) -> list[Case]:
    """The cases of a selection, in an order that every process agrees on."""
    gpus = [arch for arch in ARCHS if arch.capability in archs]
    types = [DTYPES[name] for name in dtypes]
    if kind == "chain":
        # The batch is not part of the code.
        return chain_cases(gpus, [dtype for dtype in types if dtype != torch.float32])
    return cases(archs=gpus, batches=batches, dtypes=types)


def certify_one(selection: Selection, index: int) -> Certificate:
    """The certificate of one case; kernels do not travel between processes, but numbers do."""
    return certify_case(selected(*selection)[index])


def certified(selection: Selection, jobs: int) -> Iterator[tuple[Case, Certificate]]:
    """Cases with their certificates, in order, made by ``jobs`` processes."""
    everything = selected(*selection)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(certify_one, selection), range(len(everything)), chunksize=4)
        yield from zip(everything, track(results, total=len(everything)), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    capabilities = [arch.capability for arch in ARCHS]
    parser.add_argument("--arch", type=int, nargs="+", choices=capabilities, default=capabilities)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kind", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--out", type=Path, help="folder for the certificates of a selection")
    options = parser.parse_args()
    selections = ("arch", "dtype", "batch", "kind")
    whole = all(getattr(options, name) == parser.get_default(name) for name in selections)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    console, broken = Console(width=200), []
    for kind in options.kind:
        selection = kind, tuple(options.arch), tuple(options.dtype), tuple(options.batch)
        certificates = {}
        for case, certificate in certified(selection, options.jobs):
            certificates[name_of(case)] = certificate
            broken += [f"{name_of(case)}: {why}" for why in complaints(case, certificate)]
        console.print(summary(certificates))
        if options.out is not None or whole:
            path = FILES[kind] if options.out is None else options.out / FILES[kind].name
            path.write_text(to_json(certificates, {"triton": triton.__version__}))
            console.print(f"{len(certificates)} certificates in {path}")
    if whole and options.out is None:
        certificate_tables.main()
        console.print(f"tables in {certificate_tables.PATH}")
    console.print(f"{len(broken)} complaints")
    for line in broken:
        console.print(line, style="red")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
