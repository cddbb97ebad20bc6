"""Each family of instructions against numpy or exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .assemble import evaluate, kernel
from .parse import PtxError
from .runner import load

RNG = np.random.default_rng(0)
EDGES = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF], np.uint64)
PAIRS32 = np.array([(a, b) for a in EDGES for b in EDGES], np.uint64).astype(np.uint32)
RANDOM64 = RNG.integers(0, 1 << 64, (200, 2), np.uint64)
RANDOM64[:4] = [(0, 0), (1 << 63, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1), (1 << 63, 1)]

FLOATS = np.array(
    [
        *(0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 3.1415927, 1e-30, -1e30, 65504.0, 65520.0, 1e-40, 6e-8),
        *(float("inf"), float("-inf"), float("nan"), 2.0**-24, 2.0**-25, 1.0 + 2.0**-23),
    ],
    np.float32,
)


def signed(values: np.ndarray, bits: int) -> list[int]:
    """The two's complement meaning of bits, as Python integers."""
    return [int(v) - (1 << bits) if int(v) >> (bits - 1) else int(v) for v in values]


def wrap(values: list[int], bits: int) -> np.ndarray:
    return np.array([v % (1 << bits) for v in values], f"u{bits // 8}")


def nearest(x: Fraction, precision: int, least: int, greatest: int) -> float:
    """``x`` rounded to even with ``precision`` bits, exponents from ``least``; slow and exact."""
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    quotient, rest = divmod(size, unit)
    up = rest * 2 > unit or (rest * 2 == unit and quotient % 2)
    size = (quotient + up) * unit
    if size >= Fraction(2) ** (greatest + 1):
        return float("inf") if x > 0 else float("-inf")
    return float(size if x > 0 else -size)


def to_f32(x: Fraction) -> float:
    return nearest(x, 24, -126, 127)


def to_f16(x: Fraction) -> float:
    return nearest(x, 11, -14, 15)


def to_bf16(x: Fraction) -> float:
    return nearest(x, 8, -126, 127)


def bf16_bits(values: list[float]) -> np.ndarray:
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# --- integers ------------------------------------------------------------------------------------

INTEGER_OPS = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: a * b >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "min.s32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
}


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_integers_of_32_bits(name: str) -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    got = evaluate(f"{name} %d, %a, %b;", "u32", ("u32", a), ("u32", b))
    values = (signed(v, 32) if ".s32" in name else [int(x) for x in v] for v in (a, b))
    expected = wrap([INTEGER_OPS[name](x, y) for x, y in zip(*values, strict=True)], 32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mul.hi.u64", lambda a, b: a * b >> 64),
        ("mul.hi.s64", lambda a, b: a * b >> 64),
        ("mul.lo.u64", lambda a, b: a * b),
        ("add.s64", lambda a, b: a + b),
    ],
)
def test_integers_of_64_bits(name: str, function) -> None:
    a, b = RANDOM64[:, 0], RANDOM64[:, 1]
    got = evaluate(f"{name} %d, %a, %b;", "u64", ("u64", a), ("u64", b))
    values = (signed(v, 64) if ".s64" in name else [int(x) for x in v] for v in (a, b))
    np.testing.assert_array_equal(
        got, wrap([function(x, y) for x, y in zip(*values, strict=True)], 64)
    )


def test_arithmetic_shift_keeps_the_sign() -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    got = evaluate("shr.s32 %d, %a, %b;", "u32", ("u32", a), ("u32", b))
    expected = [x >> min(int(y), 31) for x, y in zip(signed(a, 32), b, strict=True)]
    np.testing.assert_array_equal(got, wrap(expected, 32))


@pytest.mark.parametrize("name", ["mul.wide.s32", "mul.wide.u32", "mad.wide.s32", "mad.lo.s32"])
def test_products_and_sums(name: str) -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    read = (lambda v: signed(v, 32)) if ".s32" in name else (lambda v: [int(x) for x in v])
    products = [x * y for x, y in zip(read(a), read(b), strict=True)]
    if name.startswith("mul"):
        got = evaluate(f"{name} %d, %a, %b;", "u64", ("u32", a), ("u32", b))
        expected = wrap(products, 64)
    elif name == "mad.lo.s32":
        inputs = ("u32", a), ("u32", b), ("u32", a[::-1])
        got = evaluate(f"{name} %d, %a, %b, %c;", "u32", *inputs)
        expected = wrap([p + int(c) for p, c in zip(products, a[::-1], strict=True)], 32)
    else:
        c = RNG.integers(0, 1 << 64, len(a), np.uint64)
        got = evaluate(f"{name} %d, %a, %b, %c;", "u64", ("u32", a), ("u32", b), ("u64", c))
        expected = wrap([p + int(z) for p, z in zip(products, c, strict=True)], 64)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_division_rounds_towards_zero(kind: str) -> None:
    pairs = PAIRS32[PAIRS32[:, 1] != 0]
    a, b = pairs[:, 0], pairs[:, 1]
    values = [signed(v, 32) if kind == "s32" else [int(x) for x in v] for v in (a, b)]
    quotients = [
        abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(*values, strict=True)
    ]
    rests = [x - q * y for x, y, q in zip(*values, quotients, strict=True)]
    inputs = ("u32", a), ("u32", b)
    got = evaluate(f"div.{kind} %d, %a, %b;", "u32", *inputs)
    np.testing.assert_array_equal(got, wrap(quotients, 32))
    got = evaluate(f"rem.{kind} %d, %a, %b;", "u32", *inputs)
    np.testing.assert_array_equal(got, wrap(rests, 32))


def test_division_by_zero_is_an_error() -> None:
    one, zero = np.ones(2, np.uint32), np.array([1, 0], np.uint32)
    with pytest.raises(PtxError, match=r"div\.u32.*division by zero"):
        evaluate("div.u32 %d, %a, %b;", "u32", ("u32", one), ("u32", zero))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = int(kind[1:])
    cases = [(s, n) for s in (0, 1, 7, 31, 32, 63, 64, 255) for n in (0, 1, 5, 31, 32, 33, 64, 255)]
    start, length = (np.array([c[i] for c in cases], np.uint32) for i in (0, 1))
    a = RNG.integers(0, 1 << 64, len(cases), np.uint64).astype(f"u{bits // 8}")
    a[::2] |= a.dtype.type(1 << (bits - 1))
    b = a[::-1].copy()
    got = evaluate(
        f"bfe.{kind} %d, %a, %b, %c;", f"u{bits}", (f"u{bits}", a), ("u32", start), ("u32", length)
    )
    expected = []
    for x, s, n in zip(a, start, length, strict=True):
        word = [int(x) >> i & 1 for i in range(bits)]
        sign = word[min(int(s) + int(n) - 1, bits - 1)] if kind[0] == "s" and n else 0
        field = [word[i + int(s)] if i < n and i + int(s) < bits else sign for i in range(bits)]
        expected.append(sum(bit << i for i, bit in enumerate(field)))
    np.testing.assert_array_equal(got, np.array(expected, a.dtype))
    if kind[0] == "s":
        return
    got = evaluate(
        f"bfi.b{bits} %d, %a, %b, %c, %e;",
        f"u{bits}",
        (f"u{bits}", a),
        (f"u{bits}", b),
        ("u32", start),
        ("u32", length),
    )
    expected = []
    for x, y, s, n in zip(a, b, start, length, strict=True):
        word = int(y)
        for i in range(int(n)):
            if int(s) + i < bits:
                at = int(s) + i
                word = word & ~(1 << at) | (int(x) >> i & 1) << at
        expected.append(word)
    np.testing.assert_array_equal(got, np.array(expected, a.dtype))


def test_prmt_lop3_and_funnel_shifts() -> None:
    a, b, c = (RNG.integers(0, 1 << 32, 64, np.uint64).astype(np.uint32) for _ in range(3))
    got = evaluate("prmt.b32 %d, %a, %b, %c;", "u32", ("u32", a), ("u32", b), ("u32", c))
    expected = []
    for x, y, selector in zip(a, b, c, strict=True):
        both = [(int(x) | int(y) << 32) >> 8 * i & 255 for i in range(8)]
        word = 0
        for i in range(4):
            nibble = int(selector) >> 4 * i & 15
            byte = both[nibble & 7]
            word |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        expected.append(word)
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))

    inputs = ("u32", a), ("u32", b), ("u32", c)
    got = evaluate("lop3.b32 %d, %a, %b, %c, 0xE8;", "u32", *inputs)
    np.testing.assert_array_equal(got, a & b | a & c | b & c)
    got = evaluate("lop3.b32 %d, %a, %b, %c, 0x96;", "u32", *inputs)
    np.testing.assert_array_equal(got, a ^ b ^ c)

    by = np.arange(64, dtype=np.uint32)
    both = [int(x) | int(y) << 32 for x, y in zip(a, b, strict=True)]
    shifts = ("u32", a), ("u32", b), ("u32", by)
    got = evaluate("shf.r.wrap.b32 %d, %a, %b, %c;", "u32", *shifts)
    np.testing.assert_array_equal(got, wrap([v >> n % 32 for n, v in enumerate(both)], 32))
    got = evaluate("shf.l.clamp.b32 %d, %a, %b, %c;", "u32", *shifts)
    clamped = [v << min(n, 32) >> 32 for n, v in enumerate(both)]
    np.testing.assert_array_equal(got, wrap(clamped, 32))


def test_counting_bits() -> None:
    a = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0, 12345], np.uint32)
    for name, function in {
        "popc.b32": lambda x: x.bit_count(),
        "clz.b32": lambda x: 32 - x.bit_length(),
        "brev.b32": lambda x: int(f"{x:032b}"[::-1], 2),
        "bfind.u32": lambda x: x.bit_length() - 1,
    }.items():
        got = evaluate(f"{name} %d, %a;", "u32", ("u32", a))
        np.testing.assert_array_equal(got, wrap([function(int(x)) for x in a], 32), err_msg=name)


def test_saturating_integers() -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    got = evaluate("add.sat.s32 %d, %a, %b;", "s32", ("u32", a), ("u32", b))
    sums = [x + y for x, y in zip(signed(a, 32), signed(b, 32), strict=True)]
    np.testing.assert_array_equal(got, np.clip(sums, -(2**31), 2**31 - 1))


# --- floating point ------------------------------------------------------------------------------


def float_triples(n: int) -> np.ndarray:
    """Triples whose sum a * b + c is hard to round: ties, cancellation, far exponents."""
    bits = RNG.integers(0, 1 << 32, (n, 3), np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1))
    scale = np.exp2(RNG.integers(-20, 20, (n, 3))).astype(np.float32)
    near = RNG.standard_normal((n, 3)).astype(np.float32) * scale
    x[::2] = near[::2]
    # c half a unit in the last place of the product, plus or minus next to nothing.
    with np.errstate(over="ignore"):
        x[::5, 2] = x[::5, 0] * x[::5, 1] * np.float32(2.0**-24)
    return np.where(np.isfinite(x), x, np.float32(1))


def test_fma_of_f32_rounds_once() -> None:
    x = float_triples(500)
    columns = [x[:, i].copy() for i in range(3)]
    got = evaluate("fma.rn.f32 %d, %a, %b, %c;", "f32", *(("f32", c) for c in columns))
    expected = []
    for a, b, c in x.tolist():
        value = Fraction(a) * Fraction(b) + Fraction(c)
        expected.append(to_f32(value) if value else a * b + c)
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_fma_where_rounding_twice_is_wrong() -> None:
    """A product just over a tie: float64 drops what decides it."""
    a = np.array([1 + 2.0**-12, -1 - 2.0**-12], np.float32)
    b = np.array([1 + 2.0**-12, 1 + 2.0**-12], np.float32)
    c = np.array([2.0**-75, 2.0**-75], np.float32)
    got = evaluate("fma.rn.f32 %d, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c))
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(2) ** -75
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array([to_f32(e) for e in exact], np.float32))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (got != twice).any()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul", "sub"])
def test_f32_by_rounding_mode(name: str, mode: str) -> None:
    x = float_triples(300)
    a, b = x[:, 0].copy(), x[:, 1].copy()
    got = evaluate(f"{name}.{mode}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b))
    apply = {
        "add": lambda u, v: u + v,
        "sub": lambda u, v: u - v,
        "mul": lambda u, v: u * v,
    }[name]
    largest = Fraction(float(np.finfo(np.float32).max))
    for u, v, w in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        exact = apply(Fraction(u), Fraction(v))
        if mode == "rn":
            assert w == to_f32(exact)
        elif abs(exact) <= largest:
            # The neighbour on the side that the mode asks for.
            toward = {"rz": -1 if exact > 0 else 1, "rm": -1, "rp": 1}[mode]
            assert (Fraction(w) - exact) * toward >= 0
            step = float(np.nextafter(np.float32(w), np.float32(-toward * np.inf)))
            assert Fraction(w) == exact or (Fraction(step) - exact) * toward < 0


@pytest.mark.parametrize("kind", ["f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_16_bit_floats_round_once(kind: str, name: str) -> None:
    n = 256
    bits = RNG.integers(0, 1 << 16, (3, n), np.uint64).astype(np.uint16)
    half = kind.startswith("f16")
    finite = bits & 0x7C00 != 0x7C00 if half else bits & 0x7F80 != 0x7F80
    bits = np.where(finite, bits, np.uint16(0x3C00))
    values = bits.view(np.float16).astype(np.float64) if half else bf16_values(bits)
    apply = {
        "add": lambda a, b, c: a + b,
        "sub": lambda a, b, c: a - b,
        "mul": lambda a, b, c: a * b,
        "fma": lambda a, b, c: a * b + c,
    }[name]
    narrow = to_f16 if half else to_bf16
    expected = [
        narrow(apply(*(Fraction(float(v)) for v in triple)))
        for triple in zip(*values.tolist(), strict=True)
    ]
    pairs = bits.view(np.uint32) if kind.endswith("x2") else bits
    count = 3 if name == "fma" else 2
    text = f"{name}.rn.{kind} %d, " + ", ".join(["%a", "%b", "%c"][:count]) + ";"
    got = evaluate(text, kind, *((kind, p.copy()) for p in pairs[:count])).view(np.uint16)
    got_values = got.view(np.float16).astype(np.float64) if half else bf16_values(got)
    np.testing.assert_array_equal(got_values, np.array(expected))


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_of_f32(name: str) -> None:
    pairs = np.array([(a, b) for a in FLOATS for b in FLOATS], np.float32)
    a, b = pairs[:, 0].copy(), pairs[:, 1].copy()
    got = evaluate(f"{name}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b))
    expected = (np.fmin if name == "min" else np.fmax)(a, b)
    np.testing.assert_array_equal(got, expected)
    both_zero = (a == 0) & (b == 0)
    signs = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
    np.testing.assert_array_equal(np.signbit(got[both_zero]), signs[both_zero])
    got = evaluate(f"{name}.NaN.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(a) | np.isnan(b))


def test_signs_and_unary_functions() -> None:
    inputs = ("f32", FLOATS)
    np.testing.assert_array_equal(evaluate("abs.f32 %d, %a;", "f32", inputs), np.abs(FLOATS))
    negative = evaluate("neg.f32 %d, %a;", "f32", inputs)
    np.testing.assert_array_equal(np.signbit(negative), ~np.signbit(FLOATS))
    x = np.exp2(RNG.uniform(-20, 20, 100)).astype(np.float32)
    for name, function in {
        "rcp.rn.f32": lambda v: 1 / v,
        "sqrt.rn.f32": np.sqrt,
        "rsqrt.approx.f32": lambda v: 1 / np.sqrt(v),
        "lg2.approx.f32": np.log2,
        "tanh.approx.f32": np.tanh,
    }.items():
        got = evaluate(f"{name} %d, %a;", "f32", ("f32", x))
        np.testing.assert_array_equal(got, function(x.astype(np.float64)).astype(np.float32))
    small = np.log2(x)
    got = evaluate("ex2.approx.f32 %d, %a;", "f32", ("f32", small))
    np.testing.assert_array_equal(got, np.exp2(small.astype(np.float64)).astype(np.float32))


def test_division_of_f32() -> None:
    x = float_triples(200)
    a, b = x[:, 0].copy(), np.where(x[:, 1] == 0, 1, x[:, 1]).astype(np.float32)
    for name in ("div.rn.f32", "div.full.f32"):
        got = evaluate(f"{name} %d, %a, %b;", "f32", ("f32", a), ("f32", b))
        expected = [
            to_f32(Fraction(u) / Fraction(v)) for u, v in zip(a.tolist(), b.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_subnormals_are_flushed_only_where_asked() -> None:
    a = np.array([1e-40, -1e-40, 1e-38, 1.0], np.float32)
    b = np.array([1.0, 1.0, 0.5, 1.0], np.float32)
    inputs = ("f32", a), ("f32", b)
    kept = evaluate("mul.f32 %d, %a, %b;", "f32", *inputs)
    np.testing.assert_array_equal(kept, a * b)
    flushed = evaluate("mul.ftz.f32 %d, %a, %b;", "f32", *inputs)
    np.testing.assert_array_equal(flushed, np.array([0, 0, 0, 1], np.float32))
    np.testing.assert_array_equal(np.signbit(flushed), [False, True, False, False])


def test_saturation_and_relu() -> None:
    a = np.array([-1, 0.25, 2, np.nan], np.float32)
    zero = np.zeros(4, np.float32)
    got = evaluate("add.sat.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", zero))
    np.testing.assert_array_equal(got, np.array([0, 0.25, 1, 0], np.float32))
    one, halves = np.full(3, 0x3C00, np.uint16), np.array([-1, 0.25, 2], np.float16).view(np.uint16)
    inputs = ("f16", halves), ("f16", one), ("f16", np.zeros(3, np.uint16))
    got = evaluate("fma.rn.relu.f16 %d, %a, %b, %c;", "f16", *inputs)
    np.testing.assert_array_equal(got.view(np.float16), np.array([0, 0.25, 2], np.float16))


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"]
)
def test_float_comparisons(name: str) -> None:
    pairs = np.array([(a, b) for a in FLOATS for b in FLOATS], np.float32)
    a, b = pairs[:, 0].copy(), pairs[:, 1].copy()
    got = evaluate(f"setp.{name}.f32 %d, %a, %b;", "pred", ("f32", a), ("f32", b))
    compare = {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }[name.removesuffix("u") if name != "neu" else "ne"]
    unordered = np.isnan(a) | np.isnan(b)
    expected = compare | unordered if name.endswith("u") else compare & ~unordered
    np.testing.assert_array_equal(got, expected)


def test_comparisons_combined_with_a_predicate() -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    got = evaluate(
        "setp.gt.u32 %p, %a, 5; setp.lt.and.s32 %d, %a, %b, !%p;", "pred", ("u32", a), ("u32", b)
    )
    less = np.array(signed(a, 32)) < np.array(signed(b, 32))
    np.testing.assert_array_equal(got, less & ~(a > 5))
    got = evaluate("setp.hs.u32 %p|%d, %a, %b;", "pred", ("u32", a), ("u32", b))
    np.testing.assert_array_equal(got, a < b)


def test_selp_and_guards() -> None:
    a, b = PAIRS32[:, 0], PAIRS32[:, 1]
    inputs = ("u32", a), ("u32", b)
    got = evaluate("setp.lt.u32 %p, %a, %b; selp.b32 %d, %a, %b, %p;", "u32", *inputs)
    np.testing.assert_array_equal(got, np.minimum(a, b))
    text = "setp.lt.u32 %p, %a, %b; mov.u32 %d, %a; @!%p mov.u32 %d, 7; @%p add.u32 %d, %d, 1;"
    np.testing.assert_array_equal(evaluate(text, "u32", *inputs), np.where(a < b, a + 1, 7))


# --- conversions ---------------------------------------------------------------------------------

CONVERSIONS = np.concatenate(
    [
        FLOATS,
        RNG.standard_normal(100).astype(np.float32) * 1000,
        np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**32, 3e9, -3e9], np.float32),
        # Ties and their neighbours for 10 and 7 bits of mantissa.
        (np.uint32(0x3F800000) + np.arange(0, 1 << 17, 4097, np.uint32)).view(np.float32),
        np.array([0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000], np.uint32).view(np.float32),
    ]
)


def test_f32_to_16_bits() -> None:
    x = CONVERSIONS
    got = evaluate("cvt.rn.f16.f32 %d, %a;", "f16", ("f32", x)).view(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, x.astype(np.float16))
    finite = x[np.isfinite(x)]
    got = evaluate("cvt.rn.bf16.f32 %d, %a;", "bf16", ("f32", finite))
    expected = [to_bf16(Fraction(float(v))) for v in finite]
    np.testing.assert_array_equal(bf16_values(got), np.array(expected, np.float32))
    got = evaluate("cvt.rz.f16.f32 %d, %a;", "f16", ("f32", finite)).view(np.float16)
    assert (np.abs(got.astype(np.float64)) <= np.abs(finite)).all()
    with np.errstate(over="ignore"):
        one_more = np.nextafter(np.abs(got), np.float16(np.inf)).astype(np.float64)
    assert (one_more > np.abs(finite)).all()


def test_packed_conversions_put_the_first_operand_high() -> None:
    a, b = CONVERSIONS, CONVERSIONS[::-1].copy()
    got = evaluate("cvt.rn.f16x2.f32 %d, %a, %b;", "u32", ("f32", a), ("f32", b))
    with np.errstate(over="ignore"):
        high, low = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
    number = ~(np.isnan(a) | np.isnan(b))
    expected = high.astype(np.uint32) << 16 | low
    np.testing.assert_array_equal(got[number], expected[number])
    got = evaluate("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", "u32", ("f32", a), ("f32", b))
    finite = np.isfinite(a) & np.isfinite(b)
    positive = [max(Fraction(0), Fraction(float(v))) for v in a[finite]]
    np.testing.assert_array_equal(
        bf16_values((got[finite] >> 16).astype(np.uint16)),
        np.array([to_bf16(v) for v in positive], np.float32),
    )


def test_tf32() -> None:
    x = CONVERSIONS[np.isfinite(CONVERSIONS)]
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", "f32", ("f32", x))
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    for v, w in zip(x.tolist(), got.tolist(), strict=True):
        exact, rounded = Fraction(v), Fraction(w)
        exponent = max(np.frexp(abs(v))[1] - 1, -126) if v else -126
        unit = Fraction(2) ** (int(exponent) - 10)
        error = abs(rounded) - abs(exact)
        # Nearest; exactly between two, the one further from zero.
        assert -unit / 2 < error <= unit / 2


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
def test_float_to_integer_saturates(mode: str, kind: str) -> None:
    x = CONVERSIONS
    got = evaluate(f"cvt.{mode}.{kind}.f32 %d, %a;", kind, ("f32", x))
    function = {"rni": round, "rzi": int, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(got.dtype)
    expected = []
    for v in x.tolist():
        if np.isnan(v):
            expected.append(0)
        elif np.isinf(v):
            expected.append(limits.max if v > 0 else limits.min)
        else:
            expected.append(min(max(int(function(v)), limits.min), limits.max))
    assert got.tolist() == expected


def test_integers_to_floats_and_integers() -> None:
    a = PAIRS32[:, 0]
    got = evaluate("cvt.rn.f32.s32 %d, %a;", "f32", ("u32", a))
    np.testing.assert_array_equal(got, [np.float32(v) for v in signed(a, 32)])
    got = evaluate("cvt.rn.f32.u32 %d, %a;", "f32", ("u32", a))
    np.testing.assert_array_equal(got, [np.float32(int(v)) for v in a])
    got = evaluate("cvt.s64.s32 %d, %a;", "s64", ("u32", a))
    assert got.tolist() == signed(a, 32)
    got = evaluate("cvt.u64.u32 %d, %a;", "u64", ("u32", a))
    assert got.tolist() == a.tolist()
    got = evaluate("cvt.s32.s8 %d, %a;", "s32", ("u32", a))
    assert got.tolist() == signed(a & 255, 8)
    got = evaluate("cvt.sat.u8.s32 %d, %a;", "u32", ("u32", a))
    assert got.tolist() == [min(max(v, 0), 255) for v in signed(a, 32)]


def test_16_bit_floats_to_f32_are_exact() -> None:
    bits = np.arange(0, 1 << 16, 97, dtype=np.uint32).astype(np.uint16)
    got = evaluate("cvt.f32.f16 %d, %a;", "f32", ("f16", bits))
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))
    got = evaluate("cvt.f32.bf16 %d, %a;", "f32", ("bf16", bits))
    np.testing.assert_array_equal(got, bf16_values(bits))


def test_mov_packs_and_unpacks() -> None:
    a = RNG.integers(0, 1 << 32, 32, np.uint64).astype(np.uint32)
    text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %a; mov.b32 %d, {hi, lo}; }"
    np.testing.assert_array_equal(evaluate(text, "u32", ("u32", a)), a >> 16 | a << 16)
    text = "{ .reg .b32 x; mov.b64 {_, x}, %a; mov.u32 %d, x; }"
    wide = a.astype(np.uint64) << 32 | 5
    np.testing.assert_array_equal(evaluate(text, "u32", ("u64", wide)), a)


# --- errors --------------------------------------------------------------------------------------


def test_an_unknown_instruction_is_named_when_run() -> None:
    module = load(kernel(".reg .b32 %r;\nmov.u32 %r, 0;\nfrobnicate.b32 %r, %r;"))
    with pytest.raises(PtxError, match=r"line 8: frobnicate\.b32 %r, %r.*not known"):
        module["test"].run(1, 1, [np.zeros(1)])


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.fence.sync.aligned;",
        "mbarrier.init.shared.b64 [0], 1;",
        "add.cc.u32 %r, %r, %r;",
        "fma.rz.f64 %d, %d, %d, %d;",
        "prmt.b32.f4e %r, %r, %r, %r;",
    ],
)
def test_what_is_not_implemented_is_refused(text: str) -> None:
    module = load(kernel(f".reg .b32 %r;\n.reg .f64 %d;\n{text}"))
    with pytest.raises(PtxError, match=r"line 8: "):
        module["test"].run(1, 1, [np.zeros(1)])


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(PtxError, match="line 7: unknown register %x"):
        load(kernel(".reg .b32 %r;\nmov.b32 %r, %r; @%x bra L;"))["test"]
    with pytest.raises(PtxError, match=r"no \.entry"):
        load("nothing")
