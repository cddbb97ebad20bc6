"""One instruction at a time: kernels assembled around it, for the tests of the runner."""

from __future__ import annotations

import numpy as np

from .operands import DTYPES, register_dtype
from .runner import load

Array = np.ndarray
HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"


def evaluate(instruction: str, result: str, *inputs: tuple[str, Array], lanes: int = 0) -> Array:
    """What ``instruction`` leaves in ``%d``, one value a lane.

    ``%d`` has the type ``result``; ``%a``, ``%b``, ... hold the ``inputs``, pairs of a type and one
    value a lane; ``%tmp`` and ``%p`` are free to use. 16-bit floats are given and returned as bits.
    """
    names = "abcefgh"
    kinds = dict(zip(names, (kind for kind, _ in inputs), strict=False))
    arrays = [np.ascontiguousarray(values, DTYPES[kind]) for kind, values in inputs]
    n = lanes or arrays[0].size
    out = np.zeros(n, np.uint8 if result == "pred" else DTYPES[result])
    params = "".join(f".param .u64 p{number}, " for number in range(len(arrays)))
    lines = [
        f".visible .entry test({params}.param .u64 pd)",
        "{",
        ".reg .pred %p; .reg .u32 %i, %tmp, %flag; .reg .u64 %addr, %base;",
        f".reg .{_register(result)} %d;",
        *(f".reg .{_register(kind)} %{name};" for name, kind in kinds.items()),
        "mov.u32 %i, %tid.x;",
    ]
    for number, (name, kind) in enumerate(kinds.items()):
        size = DTYPES[kind].itemsize
        lines += [
            f"ld.param.u64 %base, [p{number}];",
            f"mad.wide.u32 %addr, %i, {size}, %base;",
            f"ld.global.b{8 * size} %{name}, [%addr];",
        ]
    lines += [instruction, "ld.param.u64 %base, [pd];"]
    if result == "pred":
        lines += [
            "selp.u32 %flag, 1, 0, %d;",
            "mad.wide.u32 %addr, %i, 1, %base;",
            "st.global.u8 [%addr], %flag;",
        ]
    else:
        size = DTYPES[result].itemsize
        lines += [
            f"mad.wide.u32 %addr, %i, {size}, %base;",
            f"st.global.b{8 * size} [%addr], %d;",
        ]
    lines += ["ret;", "}"]
    load(HEADER + "\n".join(lines))["test"].run(1, n, [*arrays, out])
    return out.astype(bool) if result == "pred" else out


def _register(kind: str) -> str:
    if kind == "pred":
        return "pred"
    # Values of 8 bits live in registers of 16.
    return f"b{max(16, 8 * register_dtype(kind).itemsize)}"


def kernel(body: str, parameters: str = ".param .u64 p0", outside: str = "") -> str:
    """A module with one kernel, ``test``."""
    return f"{HEADER}{outside}.visible .entry test({parameters})\n{{\n{body}\nret;\n}}\n"
