"""Arithmetic, logic, comparison and conversion.

Fused multiply-adds and sums of narrow formats are rounded once, exactly. The approximate functions
(``rcp.approx``, ``ex2.approx``, ...), whose last bits the PTX ISA leaves to the hardware, give the
correctly rounded value instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import (
    bf16_of,
    bf16_to_f32,
    f16_of,
    f16_to_f32,
    f32_of,
    flush,
    fma_odd,
    tf32_of,
)
from .machine import Decoded, Lanes, Wave
from .operands import DTYPES, Array, Context, Read, unsupported
from .parse import Imm, Instruction, Pair, PtxError

Decoder = Callable[[Context, Instruction], Decoded]
DECODERS: dict[str, Decoder] = {}

_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


def decodes(*names: str) -> Callable[[Decoder], Decoder]:
    """Register the decoder of these opcodes."""

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = decoder
        return decoder

    return register


def _elementwise(
    context: Context, i: Instruction, function: Callable[..., Array], kinds: str | tuple[str, ...]
) -> Decoded:
    """``d = function(a, b, ...)``; ``kinds`` are the types of d, a, b, ... or that of them all."""
    if isinstance(kinds, str):
        kinds = (kinds,) * len(i.operands)
    write = context.write(i.operands[0], kinds[0])
    reads = [context.read(o, k) for o, k in zip(i.operands[1:], kinds[1:], strict=True)]

    def step(wave: Wave, lanes: Lanes) -> None:
        write(wave, lanes, function(*(read(wave, lanes) for read in reads)))

    return Decoded(i, step=step)


def _rounding(i: Instruction) -> str:
    return next((p for p in i.parts if p in _ROUNDINGS), "rn")


# --- floating point ------------------------------------------------------------------------------


class Float:
    """How a floating-point type is computed: its bits to exact values, and rounded back."""

    def __init__(self, i: Instruction, kind: str) -> None:
        self.kind, self.mode = kind, _rounding(i)
        self.ftz, self.sat, self.relu = i.has("ftz"), i.has("sat"), i.has("relu")
        if i.has("xorsign"):
            raise unsupported(i)

    def widen(self, x: Array) -> Array:
        """Values to compute with (float32 or float64), exact."""
        if self.kind.startswith("f16"):
            return f16_to_f32(_lanes16(x))
        if self.kind.startswith("bf16"):
            return bf16_to_f32(_lanes16(x))
        return flush(x) if self.ftz and x.dtype == np.float32 else x

    def round(self, x: Array) -> Array:
        """An exact or rounded-to-odd float64 (or a float32) in the type's own bits."""
        if self.sat:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)
        if self.relu:
            x = np.where(x < 0, x.dtype.type(0), x)
        if self.kind.startswith("f16"):
            return _pack16(f16_of(x, self.mode), self.kind)
        if self.kind.startswith("bf16"):
            return _pack16(bf16_of(x, self.mode), self.kind)
        if self.kind == "f32":
            y = x if x.dtype == np.float32 else f32_of(x, self.mode)
            return flush(y) if self.ftz else y
        return x


def _lanes16(x: Array) -> Array:
    """The 16-bit halves of packed pairs, [..., 2]; scalars of 16 bits as they are."""
    x = np.asarray(x)
    if x.dtype.itemsize == 2:
        return x.view(np.uint16)
    return np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint16)


def _pack16(x: Array, kind: str) -> Array:
    if not kind.endswith("x2"):
        return x
    return np.ascontiguousarray(x).view(np.uint32).reshape(x.shape[:-1])


def _float_op(context: Context, i: Instruction, kind: str) -> Decoded:
    f = Float(i, kind)
    op = i.op
    if kind == "f64" and (op == "fma" or f.mode != "rn"):
        raise unsupported(i, "float64 is only computed with one operation, to nearest")

    def function(*raw: Array) -> Array:
        x = [f.widen(np.asarray(r)) for r in raw]
        if kind == "f64" or (kind == "f32" and f.mode == "rn" and op in ("add", "sub", "mul")):
            plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op](*x)
            return f.round(np.asarray(plain))
        a, b = x[0], x[1]
        if op == "add":
            return f.round(fma_odd(a, np.float64(1), b))
        if op == "sub":
            return f.round(fma_odd(b, np.float64(-1), a))
        # 0 * b + -0 would lose the sign of a zero product.
        exact = np.asarray(a, np.float64) * b if op == "mul" else fma_odd(a, b, x[2])
        return f.round(np.asarray(exact))

    return _elementwise(context, i, function, kind)


@decodes("fma")
def _fma(context: Context, i: Instruction) -> Decoded:
    return _float_op(context, i, i.types[-1])


_UNARY: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@decodes(*_UNARY)
def _unary(context: Context, i: Instruction) -> Decoded:
    kind, function = i.types[-1], _UNARY[i.op]
    f = Float(i, kind)
    if f.mode != "rn" and not i.has("approx"):
        raise unsupported(i, "only rounding to nearest is implemented")
    return _elementwise(
        context,
        i,
        lambda x: f.round(np.asarray(function(np.asarray(f.widen(np.asarray(x)), np.float64)))),
        kind,
    )


@decodes("min", "max")
def _min_max(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    if kind not in (*_HALVES, "f32", "f64"):
        pick = np.minimum if i.op == "min" else np.maximum
        relu = i.has("relu")

        def integers(*x: Array) -> Array:
            y = pick(x[0], x[1])
            return np.maximum(y, 0) if relu else y

        return _elementwise(context, i, integers, kind)
    f = Float(i, kind)
    propagating, ignoring = (np.minimum, np.fmin) if i.op == "min" else (np.maximum, np.fmax)
    choose = propagating if i.has("NaN") else ignoring

    def function(*raw: Array) -> Array:
        x = [f.widen(np.asarray(r)) for r in raw]
        y = x[0]
        for other in x[1:]:
            # -0 is less than +0 here, which numpy does not promise.
            either, both = np.signbit(y) | np.signbit(other), np.signbit(y) & np.signbit(other)
            zero = np.where(either if i.op == "min" else both, -0.0, 0.0).astype(y.dtype)
            y = np.where((y == 0) & (other == 0), zero, choose(y, other))
        return f.round(np.asarray(y))

    return _elementwise(context, i, function, kind)


@decodes("abs", "neg")
def _sign(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    if kind not in (*_HALVES, "f32", "f64"):
        function = np.abs if i.op == "abs" else np.negative
        return _elementwise(context, i, function, kind)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[DTYPES[kind].itemsize]
    mask = bits(0x80008000 if kind.endswith("x2") else 1 << (8 * DTYPES[kind].itemsize - 1))
    ftz = i.has("ftz")

    def sign(x: Array) -> Array:
        x = flush(x) if ftz and kind == "f32" else np.asarray(x)
        raw = x.view(bits)
        return (raw ^ mask if i.op == "neg" else raw & ~mask).view(x.dtype)

    return _elementwise(context, i, sign, kind)


@decodes("copysign")
def _copysign(context: Context, i: Instruction) -> Decoded:
    # copysign.f32 d, a, b: the sign of a, the magnitude of b.
    return _elementwise(context, i, lambda a, b: np.copysign(b, a), i.types[-1])


@decodes("div")
def _div(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    if kind in ("f32", "f64"):
        f = Float(i, kind)
        if f.mode != "rn":
            raise unsupported(i, "only rounding to nearest is implemented")
        return _elementwise(
            context, i, lambda a, b: f.round(np.asarray(f.widen(a) / f.widen(b))), kind
        )
    return _elementwise(context, i, lambda a, b: _truncated(a, b)[0], kind)


@decodes("rem")
def _rem(context: Context, i: Instruction) -> Decoded:
    return _elementwise(context, i, lambda a, b: _truncated(a, b)[1], i.types[-1])


def _truncated(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient rounded towards zero, and remainder."""
    a, b = np.asarray(a), np.asarray(b)
    if (b == 0).any():
        raise PtxError("integer division by zero")
    quotient = a // b
    if a.dtype.kind == "i":
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient, a - quotient * b


# --- integers ------------------------------------------------------------------------------------


@decodes("add", "sub")
def _add(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    if kind in (*_HALVES, "f32", "f64"):
        return _float_op(context, i, kind)
    if i.has("cc"):
        raise unsupported(i, "carries are not implemented")
    function = np.add if i.op == "add" else np.subtract
    if i.has("sat"):
        limits = np.iinfo(np.int32)

        def saturated(a: Array, b: Array) -> Array:
            wide = function(np.asarray(a, np.int64), np.asarray(b, np.int64))
            return np.clip(wide, limits.min, limits.max).astype(np.int32)

        return _elementwise(context, i, saturated, kind)
    return _elementwise(context, i, function, kind)


@decodes("mul", "mad")
def _mul(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    if kind in (*_HALVES, "f32", "f64"):
        if i.op == "mad":
            raise unsupported(i, "mad of floats is not defined for these architectures")
        return _float_op(context, i, kind)
    if i.has("cc", "sat"):
        raise unsupported(i, "carries and saturation are not implemented")
    if i.has("wide"):
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        dtype = DTYPES[wide]

        def widening(a: Array, b: Array, *c: Array) -> Array:
            product = np.multiply(a, b, dtype=dtype)
            return product + c[0] if c else product

        kinds = (wide, kind, kind) + ((wide,) if i.op == "mad" else ())
        return _elementwise(context, i, widening, kinds)
    if i.has("hi"):
        high = _high64 if kind.endswith("64") else _high

        def function(a: Array, b: Array, *c: Array) -> Array:
            product = high(np.asarray(a), np.asarray(b))
            return product + c[0] if c else product

        return _elementwise(context, i, function, kind)
    return _elementwise(context, i, lambda a, b, *c: a * b + c[0] if c else np.multiply(a, b), kind)


def _high(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (np.multiply(a, b, dtype=wide) >> wide(bits)).astype(a.dtype)


def _high64(a: Array, b: Array) -> Array:
    """The upper 64 bits of products, from four products of 32-bit halves."""
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


@decodes("and", "or", "xor")
def _logic(context: Context, i: Instruction) -> Decoded:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.op]
    return _elementwise(context, i, function, i.types[-1])


@decodes("not")
def _not(context: Context, i: Instruction) -> Decoded:
    return _elementwise(context, i, np.invert, i.types[-1])


@decodes("cnot")
def _cnot(context: Context, i: Instruction) -> Decoded:
    return _elementwise(context, i, lambda x: (x == 0).astype(x.dtype), i.types[-1])


@decodes("shl", "shr")
def _shift(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    bits = 8 * DTYPES[kind].itemsize
    left, signed = i.op == "shl", kind[0] == "s"

    def function(x: Array, by: Array) -> Array:
        x = np.asarray(x)
        # Shifts by the width or more give zero, or the sign.
        within = np.minimum(by, bits - 1).astype(x.dtype)
        if signed and not left:
            return x >> within
        shifted = x << within if left else x >> within
        return np.where(by < bits, shifted, 0).astype(x.dtype)

    return _elementwise(context, i, function, (kind, kind, "u32"))


@decodes("shf")
def _funnel(context: Context, i: Instruction) -> Decoded:
    left, clamp = i.has("l"), i.has("clamp")

    def function(a: Array, b: Array, by: Array) -> Array:
        both = np.asarray(b, np.uint64) << np.uint64(32) | a
        by = (np.minimum(by, 32) if clamp else by & np.uint32(31)).astype(np.uint64)
        shifted = both << by >> np.uint64(32) if left else both >> by
        return np.asarray(shifted).astype(np.uint32)

    return _elementwise(context, i, function, ("b32", "b32", "b32", "u32"))


@decodes("bfe")
def _bfe(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    width, signed = int(kind[1:]), kind[0] == "s"
    unsigned = f"u{width}"

    def function(x: Array, start: Array, length: Array) -> Array:
        start, length = (np.asarray(v & np.uint32(255), np.int64) for v in (start, length))
        x = np.asarray(x, np.uint64)
        have = np.clip(np.minimum(length, width - start), 0, 64).astype(np.uint64)
        mask = _ones(have)
        value = np.where(start < 64, x >> np.minimum(start, 63).astype(np.uint64), 0) & mask
        if signed:
            top = np.clip(start + length - 1, 0, width - 1).astype(np.uint64)
            negative = (x >> top & np.uint64(1)).astype(bool) & (length > 0)
            value = np.where(negative, value | ~mask, value)
        return value.astype(DTYPES[unsigned])

    return _elementwise(context, i, function, (unsigned, unsigned, "u32", "u32"))


@decodes("bfi")
def _bfi(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    width = int(kind[1:])

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = (np.asarray(v & np.uint32(255), np.int64) for v in (start, length))
        a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
        shift = np.minimum(start, 63).astype(np.uint64)
        field = np.where(start < width, _ones(np.minimum(length, 64).astype(np.uint64)), 0) << shift
        return np.asarray((b & ~field) | (a << shift & field)).astype(DTYPES[kind])

    return _elementwise(context, i, function, (kind, kind, kind, "u32", "u32"))


def _ones(n: Array) -> Array:
    """The lowest ``n`` bits, 0 <= n <= 64."""
    one = np.uint64(1)
    return np.where(n >= 64, ~np.uint64(0), (one << np.minimum(n, 63).astype(np.uint64)) - one)


@decodes("prmt")
def _prmt(context: Context, i: Instruction) -> Decoded:
    if i.parts[1:] != ("b32",):
        raise unsupported(i, "only the default mode of prmt is implemented")

    def function(a: Array, b: Array, selector: Array) -> Array:
        both = np.asarray(b, np.uint64) << np.uint64(32) | a
        selector = np.asarray(selector, np.uint64)
        out: Array = np.uint64(0)
        for position in range(4):
            nibble = selector >> np.uint64(4 * position)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            out = out | byte << np.uint64(8 * position)
        return np.asarray(out).astype(np.uint32)

    return _elementwise(context, i, function, "b32")


@decodes("lop3")
def _lop3(context: Context, i: Instruction) -> Decoded:
    table = i.operands[4]
    if i.parts[1:] != ("b32",) or not isinstance(table, Imm):
        raise unsupported(i)
    chosen = [n for n in range(8) if table.value >> n & 1]

    def function(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for n in chosen:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return out

    three = Instruction(i.parts, i.operands[:4], i.guard, i.line, i.text)
    return _elementwise(context, three, function, "b32")


@decodes("popc", "clz", "brev", "bfind")
def _bits(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    width = 8 * DTYPES[kind].itemsize
    if i.op == "bfind" and (kind[0] == "s" or i.has("shiftamt")):
        raise unsupported(i)

    def table(x: Array) -> Array:
        shifts = np.arange(width, dtype=np.uint64)
        return np.asarray(x, np.uint64)[..., None] >> shifts & np.uint64(1)

    def leading(x: Array) -> Array:
        digits = table(x)[..., ::-1]
        return np.where(digits.any(-1), digits.argmax(-1), width)

    def function(x: Array) -> Array:
        if i.op == "popc":
            return table(x).sum(-1).astype(np.uint32)
        if i.op == "clz":
            return leading(x).astype(np.uint32)
        if i.op == "bfind":
            return (width - 1 - leading(x)).astype(np.int32).view(np.uint32)
        weights = np.uint64(1) << np.arange(width, dtype=np.uint64)[::-1]
        return (table(x) * weights).sum(-1).astype(DTYPES[kind])

    return _elementwise(context, i, function, (kind if i.op == "brev" else "u32", kind))


# --- comparison and selection --------------------------------------------------------------------

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(i: Instruction, kind: str) -> Callable[[Array, Array], Array]:
    name = i.parts[1]
    if kind not in (*_HALVES, "f32", "f64"):
        return _COMPARE[_UNSIGNED.get(name, name)]
    f = Float(i, kind)

    def function(a: Array, b: Array) -> Array:
        a, b = f.widen(np.asarray(a)), f.widen(np.asarray(b))
        unordered = np.isnan(a) | np.isnan(b)
        if name == "nan":
            return unordered
        if name == "num":
            return ~unordered
        if name in _COMPARE:
            # Ordered: false with a NaN, "ne" too.
            return _COMPARE[name](a, b) & ~unordered
        return _COMPARE[name.removesuffix("u")](a, b) | unordered

    return function


@decodes("setp")
def _setp(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    compare = _comparison(i, kind)
    a, b = context.read(i.operands[1], kind), context.read(i.operands[2], kind)
    combine, third = _combination(context, i)
    d = i.operands[0]
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    writes = context.write(first, "pred"), context.write(second, "pred")
    packed = kind.endswith("x2")

    def step(wave: Wave, lanes: Lanes) -> None:
        result = compare(a(wave, lanes), b(wave, lanes))
        results = (result[..., 0], result[..., 1]) if packed else (result, ~result)
        other = third(wave, lanes)
        for write, value in zip(writes, results, strict=True):
            write(wave, lanes, combine(value, other))

    return Decoded(i, step=step)


def _combination(context: Context, i: Instruction) -> tuple[Callable[..., Array], Read]:
    """How setp joins its result with a third operand."""
    if len(i.operands) == 3:
        return (lambda value, _: value), (lambda wave, lanes: np.bool_(True))
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.parts[2]]
    return function, context.read(i.operands[3], "pred")


@decodes("set")
def _set(context: Context, i: Instruction) -> Decoded:
    result, kind = i.types
    if kind.endswith("x2") or len(i.operands) != 3 or result not in ("u32", "s32", "f32"):
        raise unsupported(i)
    compare = _comparison(i, kind)
    dtype = DTYPES[result]
    true = dtype.type(1.0) if result == "f32" else np.array(-1).astype(dtype)[()]
    return _elementwise(
        context,
        i,
        lambda a, b: np.where(compare(a, b), true, dtype.type(0)).astype(dtype),
        (result, kind, kind),
    )


@decodes("selp")
def _selp(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    return _elementwise(context, i, lambda a, b, p: np.where(p, a, b), (kind, kind, kind, "pred"))


@decodes("testp")
def _testp(context: Context, i: Instruction) -> Decoded:
    functions: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
    }
    if i.parts[1] not in functions:
        raise unsupported(i)
    return _elementwise(context, i, functions[i.parts[1]], ("pred", i.types[-1]))


# --- conversion ----------------------------------------------------------------------------------

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt")
def _cvt(context: Context, i: Instruction) -> Decoded:
    to, source = i.types
    if to in ("f16x2", "bf16x2"):
        return _cvt_packed(context, i, to, source)
    floats = (*_HALVES, "f32", "f64", "tf32")
    if source in floats and to in floats:
        function = _between_floats(i, to, source)
    elif source in floats:
        function = _float_to_integer(i, to, source)
    elif to in floats:
        function = _integer_to_float(i, to)
    else:
        function = _between_integers(i, to)
    return _elementwise(context, i, function, (to, source))


def _between_floats(i: Instruction, to: str, source: str) -> Callable[[Array], Array]:
    integral = next((_TO_INTEGER[p] for p in i.parts if p in _TO_INTEGER), None)
    wide = Float(i, source)
    narrow = Float(i, to if to != "tf32" else "f32")
    if to == "tf32":
        mode = _rounding(i)
        return lambda x: tf32_of(narrow.round(np.asarray(x)), mode)

    def function(x: Array) -> Array:
        y = np.asarray(wide.widen(np.asarray(x)), np.float64)
        return narrow.round(integral(y) if integral is not None else y) if to != "f64" else y

    return function


def _float_to_integer(i: Instruction, to: str, source: str) -> Callable[[Array], Array]:
    integral = next((_TO_INTEGER[p] for p in i.parts if p in _TO_INTEGER), None)
    if integral is None:
        raise unsupported(i, "no rounding mode")
    f, limits, dtype = Float(i, source), np.iinfo(DTYPES[to]), DTYPES[to]

    def function(x: Array) -> Array:
        y = integral(np.asarray(f.widen(np.asarray(x)), np.float64))
        # Out of range saturates; NaN gives 0. float64 rounds the limits of 64 bits up.
        high, low = y >= float(limits.max), y <= float(limits.min)
        inside = np.where(np.isnan(y) | high | low, 0, y).astype(dtype)
        return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))

    return function


def _integer_to_float(i: Instruction, to: str) -> Callable[[Array], Array]:
    f = Float(i, to)
    if f.mode != "rn" and to != "f64":
        raise unsupported(i, "integers are only converted to nearest")

    def function(x: Array) -> Array:
        x = np.asarray(x)
        if to in ("f32", "f64"):
            return x.astype(DTYPES[to])
        if x.dtype.itemsize == 8:
            raise PtxError("64-bit integers to 16-bit floats are not implemented")
        return f.round(x.astype(np.float64))

    return function


def _between_integers(i: Instruction, to: str) -> Callable[[Array], Array]:
    dtype, limits, saturate = DTYPES[to], np.iinfo(DTYPES[to]), i.has("sat")

    def function(x: Array) -> Array:
        x = np.asarray(x)
        if saturate:
            own = np.iinfo(x.dtype)
            x = np.clip(x, max(own.min, limits.min), min(own.max, limits.max))
        return x.astype(dtype)

    return function


def _cvt_packed(context: Context, i: Instruction, to: str, source: str) -> Decoded:
    """cvt.rn.f16x2.f32 d, a, b: a to the upper half, b to the lower."""
    if source != "f32" or len(i.operands) != 3:
        raise unsupported(i)
    f = Float(i, to.removesuffix("x2"))
    finite = i.has("satfinite")
    largest = 65504.0 if to == "f16x2" else float(bf16_to_f32(np.uint16(0x7F7F)))

    def half(x: Array) -> Array:
        x = np.asarray(x, np.float64)
        return f.round(np.clip(x, -largest, largest) if finite else x).astype(np.uint32)

    return _elementwise(
        context, i, lambda a, b: half(a) << np.uint32(16) | half(b), (to, "f32", "f32")
    )
