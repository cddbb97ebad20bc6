"""Writes docs/certificates.md from the committed certificates of the Triton kernels.

    python -m benchmarks.certificate_tables

`benchmarks.certify_triton` calls it after a run of the whole matrix. Nothing is compiled here:
the machine code's figures are those of ``benchmarks/certificates``, the rest is arithmetic on
shapes.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_resnet.backends.triton_.certify import (
    Case,
    cases,
    chain_cases,
    code_of,
    configuration_of,
    full_precision,
    is_dissolved,
    is_large,
    layer_cases,
    name_of,
    resnet_problems,
)
from fused_resnet.backends.triton_.config import ARCHS, MIN_SHARE
from fused_resnet.backends.triton_.launch import TYPES
from fused_resnet.backends.triton_.reduce import reduce_kernel
from fused_resnet.certify import (
    DEVICES,
    Certificate,
    Work,
    bound,
    certificates_of,
    load_json,
)
from fused_resnet.problem import ConvProblem

ROOT = Path(__file__).parent
CONV, CHAIN = (ROOT / "certificates" / f"{name}.json" for name in ("triton", "triton_chain"))
PATH = ROOT.parent / "docs" / "certificates.md"

_HEAD = """# Certificates of the Triton kernels

<!-- Written by `python -m benchmarks.certificate_tables`; do not edit. -->

`make certify` compiles every launch that the heuristic returns for the layers of ResNet-18 and
ResNet-50 at batch 1, 32 and 256, in fp16, bf16 and fp32 (with TF32 and without), for six GPUs, and
every configuration that is offered for chained bottlenecks. It reads the machine code; a
configuration with local memory, accesses of activations or weights narrower than 16 bytes, no
tensor instruction of its GPU's generation, no asynchronous copies, or more shared memory than a
block may have is not in the space. `benchmarks/certificates` has a line for each code.

So many codes are committed of those that `make certify` judges, and, after the semicolon, so many
configurations (kernel, dtype, tile and schedule, whatever the layer) have at least one of them:
"""

_LABEL = """
No GPU ran. Registers, memory, instructions and widths are read from machine code and exact. The
*share* of the tensor rate is *predicted*: what the instruction mix of the main loop leaves of it,
see `fused_resnet.certify.model`. Times are *predicted* bounds from published peaks.
"""

_SHARES = f"""
## Layers below {MIN_SHARE} of the tensor rate

Of the layers whose matrix product is at least 128 deep and 128 wide (K = R * S * C products, N
output channels), these stay below a predicted {MIN_SHARE}; in all others that are certified here
the share is at least that. Loops that dissolve into straight code, with no more slices than
stages in flight, have no share. Fp32 without TF32 uses no tensor cores and is left out.
"""

_NARROW = """
## Layers of less than 128 channels

The stem and the layers of 64 output channels read more bytes of shared memory for each product than
wide tiles do; nearly all of them are bound by memory traffic (see the bounds below), so that tensor
cores wait anyway.
"""

_BOUNDS = """
## What the layers need at least

ResNet-50 at batch 32 in fp16: bytes through memory (input, weights, residual and output, each
once), operations, and the least time by published peaks. *Predicted*; nothing was timed.
"""

#: Why a share is what it is, by the term of the model that binds the main loop.
_REASONS = {
    "smem": "shared memory: operands read, and pixels written by cp.async, take more cycles",
    "issue": "instructions issued in the loop take more cycles",
    "tensor": "the tensor instruction itself runs below the full rate",
}


@dataclass(frozen=True)
class Layer:
    """A layer's launch at one batch, with its certificate and that one's name."""

    name: str
    case: Case
    certificate: Certificate

    @property
    def problem(self) -> ConvProblem:
        assert isinstance(self.case.problem, ConvProblem)
        return self.case.problem

    @property
    def config(self) -> str:
        """The configuration, as tables print it."""
        config = self.case.config
        return self.case.launch.kernel.fn.__name__ if config is None else config.name

    @property
    def share(self) -> float | None:
        """Predicted share of the tensor rate; None for straight code."""
        return None if is_dissolved(self.case) else self.certificate.share


def layers(certificates: dict[str, Certificate]) -> Iterator[Layer]:
    """The convolution launches that run on tensor cores, those of all batches."""
    names: dict[object, str] = {}
    for case in layer_cases():
        name = names.setdefault(code_of(case), name_of(case))
        on_tensor_cores = case.launch.kernel is not reduce_kernel and not full_precision(case)
        if on_tensor_cores and name in certificates:
            yield Layer(name, case, certificates[name])


def rows_of(cells: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table, the head first; figures are right-aligned."""
    head, *body = [list(row) for row in cells]
    rule = [
        "---:" if all(row[i][:1].isdigit() or row[i] in ("", "-") for row in body) else "---"
        for i in range(len(head))
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)) + "\n"


def kernels_table(certificates: dict[str, Certificate], straight: Container[str] = ()) -> str:
    """A line for each kernel and GPU: the extremes of each figure.

    Codes named in ``straight`` have no main loop, and so no share.
    """
    groups: dict[tuple[str, int], dict[str, Certificate]] = {}
    for name, certificate in certificates.items():
        groups.setdefault((name.split(" | ")[1], certificate.sm), {})[name] = certificate
    head = (
        "kernel", "GPU", "codes", "registers", "shared KiB", "spills", "tensor instructions",
        "bytes a store", "asynchronous copies", "predicted share",
    )  # fmt: skip
    lines = [head]
    for (kernel, sm), named in sorted(groups.items()):
        group = list(named.values())
        kinds = sorted({c.tensor_kind for c in group if c.tensor_kind} - {"fp32"})
        looped = (c.share for name, c in named.items() if name not in straight)
        shares = [share for share in looped if share is not None] if kinds else []
        copies = sorted({copy for c in group for copy in c.async_copies})
        lines.append(
            (
                f"`{kernel}`",
                f"sm_{sm}",
                str(len(group)),
                _span(c.registers for c in group),
                _span(c.shared // 1024 for c in group),
                str(sum(c.spills for c in group)),
                ", ".join(kinds) or "-",
                _span(width for c in group for width in c.widths("STG")),
                ", ".join(copies) or "-",
                f"{min(shares):.2f}-{max(shares):.2f}" if shares else "-",
            )
        )
    return rows_of(lines)


def coverage_table(kind: str, every: Iterable[Case], committed: Container[str]) -> str:
    """Codes that ``make certify`` judges and that are committed, then configurations of them."""
    codes: dict[tuple[str, int], dict[str, bool]] = {}
    configurations: dict[tuple[str, int], dict[Hashable, bool]] = {}
    for case in every:
        name, configuration = name_of(case), configuration_of(case)
        where = arithmetic_of(case), case.arch.capability
        codes.setdefault(where, {})[name] = name in committed
        known = configurations.setdefault(where, {})
        known[configuration] = known.get(configuration, False) or name in committed
    lines = [[kind, *(f"sm_{arch.capability}" for arch in ARCHS)]]
    for dtype in dict.fromkeys(dtype for dtype, _ in codes):
        line = [dtype]
        for arch in ARCHS:
            found = [x[dtype, arch.capability].values() for x in (codes, configurations)]
            line.append("; ".join(f"{sum(known)} of {len(known)}" for known in found))
        lines.append(line)
    return rows_of(lines)


def arithmetic_of(case: Case) -> str:
    """``fp16``, ``bf16``, ``tf32``, or ``fp32`` on the ordinary multiply-add units."""
    problem = case.problem
    name = problem.split()[-1] if isinstance(problem, str) else TYPES[problem.dtype]
    return "tf32" if name == "fp32" and case.precision != "ieee" else name


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    if not found:
        return "-"
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def shares_table(found: Iterable[Layer]) -> str:
    """Layers grouped by shape, arithmetic, configuration and share; batches and GPUs are listed."""
    groups: dict[tuple[str, ...], tuple[set[int], set[int]]] = {}
    for layer in found:
        p, loop = layer.problem, layer.certificate.loop
        assert loop is not None
        assert loop.limiter is not None
        stride = f"/{p.stride[0]}" if p.stride != (1, 1) else ""
        key = (
            f"{p.r}x{p.s}{stride} {p.c}->{p.k}, {p.h}x{p.w}", arithmetic_of(layer.case),
            layer.config, f"{layer.share:.2f}", _REASONS[loop.limiter],
        )  # fmt: skip
        batches, gpus = groups.setdefault(key, (set(), set()))
        batches.add(p.n)
        gpus.add(layer.case.arch.capability)
    head = ("layer", "batch", "dtype", "GPU", "configuration", "share", "what binds it")
    lines = [head]
    for (shape, dtype, config, share, why), (batches, gpus) in groups.items():
        lines.append(
            (
                shape,
                ", ".join(map(str, sorted(batches))),
                dtype,
                ", ".join(f"sm_{sm}" for sm in sorted(gpus)),
                f"`{config}`",
                share,
                why,
            )
        )
    return rows_of(lines)


def bounds_table() -> str:
    """Bytes, operations and roofline times of ResNet-50's layers."""
    head = ["layer", "MB", "GFLOP", *(f"{d.name}, us" for d in DEVICES)]
    lines = [head]
    for problem in resnet_problems(50, 32, torch.float16):
        work = Work(problem.flops, problem.min_bytes)
        bounds = [bound(work, device) for device in DEVICES]
        pool = " and max-pool" if problem.pool is not None else ""
        lines.append(
            [
                f"{str(problem).replace(' 32x', ' ').replace(' float16', '')}{pool}",
                f"{problem.min_bytes / 1e6:.1f}",
                f"{problem.flops / 1e9:.2f}",
                *(f"{b.predicted_us:.1f} ({b.limiter})" for b in bounds),
            ]
        )
    return rows_of(lines)


def document(conv: dict[str, Certificate], chain: dict[str, Certificate]) -> str:
    """The page."""
    found = list(layers(conv))
    straight = {layer.name for layer in found if layer.share is None}
    judged = [layer for layer in found if layer.share is not None]
    low = [x for x in judged if is_large(x.problem) and (x.share or 0) < MIN_SHARE - 0.005]
    narrow = [x for x in judged if not is_large(x.problem)]
    return "".join(
        [
            _HEAD,
            "\n",
            coverage_table("convolutions and the rest", cases(), conv),
            "\n",
            coverage_table("chained bottlenecks", chain_cases(), chain),
            _LABEL,
            "\n## Convolutions and what surrounds them\n\n",
            kernels_table(conv, straight),
            "\n## Chained bottlenecks\n\n",
            kernels_table(chain),
            _SHARES,
            "\n",
            shares_table(low) if low else "There are none.\n",
            _NARROW,
            "\n",
            shares_table(narrow),
            _BOUNDS,
            "\n",
            bounds_table(),
        ]
    )


def main() -> None:
    conv, chain = (certificates_of(load_json(path)) for path in (CONV, CHAIN))
    PATH.write_text(document(conv, chain))


if __name__ == "__main__":
    main()
