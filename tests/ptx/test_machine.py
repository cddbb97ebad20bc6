"""Memory, control flow, warps and barriers: what is allowed, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from .assemble import evaluate, kernel
from .parse import PtxError
from .runner import Pointer, load

RNG = np.random.default_rng(1)

#: %i is the thread, %addr the address of its 4-byte element of p0.
LANE = """
.reg .pred %p, %q; .reg .b16 %h<8>; .reg .b32 %i, %r<16>, %v<8>; .reg .f32 %f<16>;
.reg .u64 %addr, %base, %rd<8>;
mov.u32 %i, %tid.x;
ld.param.u64 %base, [p0];
mad.wide.u32 %addr, %i, 4, %base;
"""


def run(body: str, *arrays: np.ndarray, block=32, grid=1, shared=0, outside="") -> None:
    parameters = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    test = load(kernel(LANE + body, parameters, outside))["test"]
    test.run(grid, block, arrays, shared, max_steps=20_000)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [("u32", np.uint32, 1), ("b16", np.uint16, 4), ("b32", np.uint32, 4), ("b64", np.uint64, 2)],
)
def test_vector_loads_and_stores(kind: str, dtype: type, width: int) -> None:
    source = RNG.integers(0, 60000, 32 * width).astype(dtype)
    target = np.zeros_like(source)
    size = source.itemsize * width
    names = ", ".join(f"%x{n}" for n in range(width))
    vector = f".v{width}" if width > 1 else ""
    operand = f"{{{names}}}" if width > 1 else names
    run(
        f"""
        .reg .{kind.replace("u", "b")} {names};
        ld.param.u64 %rd0, [p1];
        mad.wide.u32 %rd1, %i, {size}, %base;
        mad.wide.u32 %rd2, %i, {size}, %rd0;
        ld.global.nc.L1::no_allocate.L2::128B{vector}.{kind} {operand}, [%rd1];
        st.global.wt{vector}.{kind} [%rd2], {operand};
        """,
        source,
        target,
    )
    np.testing.assert_array_equal(target, source)


def test_narrow_loads_extend() -> None:
    source = np.array([-5, 7, -128, 127], np.int8)
    signed, unsigned = np.zeros(4, np.int32), np.zeros(4, np.int32)
    run(
        """
        cvt.u64.u32 %rd0, %i;
        add.u64 %rd0, %rd0, %base;
        ld.global.s8 %r0, [%rd0];
        ld.global.u8 %r1, [%rd0];
        ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd1, %i, 4, %rd1; st.global.u32 [%rd1], %r0;
        ld.param.u64 %rd1, [p2]; mad.wide.u32 %rd1, %i, 4, %rd1; st.global.u32 [%rd1], %r1;
        """,
        source,
        signed,
        unsigned,
        block=4,
    )
    np.testing.assert_array_equal(signed, source)
    np.testing.assert_array_equal(unsigned, source.view(np.uint8))


@pytest.mark.parametrize("access", ["ld.global.u32 %r0, [%addr];", "st.global.u32 [%addr], %i;"])
def test_global_accesses_are_bounded(access: str) -> None:
    run(access, np.zeros(32, np.uint32))
    with pytest.raises(PtxError, match=r"line \d+: (ld|st)\.global.*out of bounds.*thread \(31, "):
        run(access, np.zeros(31, np.uint32), np.zeros(1024, np.uint32))
    with pytest.raises(PtxError, match=r"out of bounds.*thread \(0, "):
        run("sub.u64 %addr, %addr, 4;" + access, np.zeros(32, np.uint32))


def test_a_guarded_access_is_not_an_access() -> None:
    data = np.zeros(31, np.uint32)
    run("setp.lt.u32 %p, %i, 31; @%p st.global.u32 [%addr], %i;", data)
    np.testing.assert_array_equal(data, np.arange(31))


def test_misaligned_accesses_are_refused() -> None:
    with pytest.raises(PtxError, match=r"ld\.global.*not a multiple of 4"):
        run("ld.global.u32 %r0, [%addr+2];", np.zeros(64, np.uint32))
    wide = "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%addr];"
    with pytest.raises(PtxError, match=r"not a multiple of 16.*thread \(1, "):
        run(wide, np.zeros(64, np.uint32))


def test_null_and_shared_addresses_are_not_global() -> None:
    with pytest.raises(PtxError, match="out of bounds"):
        run("mov.u64 %rd0, 0; ld.global.u32 %r0, [%rd0];", np.zeros(32, np.uint32))
    with pytest.raises(PtxError, match="out of bounds"):
        run("mov.u32 %r1, 0; ld.shared.u32 %r0, [%r1];", np.zeros(32, np.uint32), shared=64)


def test_pointers_into_arrays_and_one_array_passed_twice() -> None:
    data = np.arange(64, dtype=np.uint32)
    module = load(
        kernel(
            LANE
            + """
            ld.param.u64 %rd0, [p1]; mad.wide.u32 %rd0, %i, 4, %rd0;
            ld.global.u32 %r0, [%rd0];
            add.u32 %r0, %r0, 1000;
            st.global.u32 [%addr], %r0;
            """,
            ".param .u64 p0, .param .u64 p1",
        )
    )
    module["test"].run(1, 32, [data, Pointer(data, 128)])
    np.testing.assert_array_equal(data, np.r_[np.arange(1032, 1064), np.arange(32, 64)])
    with pytest.raises(PtxError, match="overlap"):
        module["test"].run(1, 32, [data, data[32:]])
    with pytest.raises(PtxError, match="contiguous"):
        module["test"].run(1, 16, [data[::2], data[::2]])


def test_arguments_are_checked() -> None:
    module = load(kernel("", ".param .u32 n, .param .f32 x, .param .align 8 .b8 s[12]"))
    module["test"].run(1, 1, [1, 2.0, bytes(12)])
    with pytest.raises(PtxError, match="no argument for parameter 2"):
        module["test"].run(1, 1, [1, 2.0])
    with pytest.raises(PtxError, match="argument 2 of test has 8 bytes, not 12"):
        module["test"].run(1, 1, [1, 2.0, bytes(8)])
    with pytest.raises(PtxError, match="4 arguments for 3"):
        module["test"].run(1, 1, [1, 2.0, bytes(12), 3])
    with pytest.raises(PtxError, match="1025 threads"):
        module["test"].run(1, 1025, [1, 2.0, bytes(12)])
    with pytest.raises(PtxError, match="cannot pass a str"):
        module["test"].run(1, 1, ["1", 2.0, bytes(12)])


def test_parameters_of_all_kinds() -> None:
    out = np.zeros(4, np.float32)
    body = """
    .reg .f32 %f<4>; .reg .u64 %rd<2>; .reg .b32 %r; .reg .b16 %h;
    ld.param.u64 %rd0, [p0];
    ld.param.s16 %r, [p1]; cvt.rn.f32.s32 %f0, %r;
    ld.param.f32 %f1, [p2];
    ld.param.v2.f32 {%f2, %f3}, [p3+8];
    st.global.v4.f32 [%rd0], {%f0, %f1, %f2, %f3};
    """
    parameters = ".param .u64 p0, .param .u16 p1, .param .f32 p2, .param .align 8 .b8 p3[16]"
    struct = np.array([1, 2, 3, 4], np.float32).tobytes()
    load(kernel(body, parameters))["test"].run(1, 1, [out, -7, 0.5, struct])
    np.testing.assert_array_equal(out, [-7, 0.5, 3, 4])


SHARED = ".shared .align 16 .b8 buffer[128];\n"


def test_shared_memory_is_one_per_block_and_starts_as_nan() -> None:
    out = np.zeros((3, 32), np.float32)
    run(
        """
        mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 4, %r0;
        setp.lt.u32 %p, %i, 16;
        mov.u32 %r2, %ctaid.x; cvt.rn.f32.u32 %f0, %r2;
        @%p st.shared.f32 [%r1], %f0;
        bar.sync 0;
        ld.shared.f32 %f1, [%r1];
        mad.lo.u32 %r3, %r2, 32, %i; mad.wide.u32 %addr, %r3, 4, %base;
        st.global.f32 [%addr], %f1;
        """,
        out,
        grid=3,
        outside=SHARED,
    )
    np.testing.assert_array_equal(out[:, :16], np.arange(3)[:, None] + np.zeros((1, 16)))
    assert np.isnan(out[:, 16:]).all()


def test_shared_memory_is_bounded() -> None:
    access = "mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 4, %r0; st.shared.u32 [%r1+4], %i;"
    with pytest.raises(PtxError, match=r"st\.shared.*shared \(128 bytes\).*thread \(31, "):
        run(access, np.zeros(1, np.uint32), outside=SHARED)


def test_dynamic_shared_memory_lies_behind_static() -> None:
    out = np.zeros(32, np.uint32)
    body = """
    mov.u32 %r0, dynamic; mov.u32 %r1, buffer; sub.u32 %r2, %r0, %r1;
    mad.lo.u32 %r3, %i, 4, %r0; st.shared.u32 [%r3], %i;
    st.shared.u32 [buffer], %r2;
    ld.shared.u32 %r4, [%r3]; ld.shared.u32 %r5, [buffer];
    add.u32 %r4, %r4, %r5; st.global.u32 [%addr], %r4;
    """
    outside = SHARED + ".extern .shared .align 64 .b8 dynamic[];\n"
    run(body, out, shared=128, outside=outside)
    np.testing.assert_array_equal(out, np.arange(32) + 128)
    with pytest.raises(PtxError, match="out of bounds"):
        run(body, out, shared=124, outside=outside)


def test_generic_addresses() -> None:
    out = np.zeros(32, np.uint32)
    run(
        """
        mov.u64 %rd0, buffer; cvta.shared.u64 %rd1, %rd0; mad.wide.u32 %rd2, %i, 4, %rd1;
        st.u32 [%rd2], %i;
        ld.u32 %r0, [%rd2];
        cvta.to.shared.u64 %rd3, %rd2; ld.shared.u32 %r1, [%rd3];
        add.u32 %r0, %r0, %r1;
        st.u32 [%addr], %r0;
        """,
        out,
        outside=SHARED,
    )
    np.testing.assert_array_equal(out, 2 * np.arange(32))


def test_local_memory_is_one_per_thread() -> None:
    out = np.zeros(32, np.uint32)
    run(
        """
        .local .align 8 .b8 depot[16];
        mov.u64 %rd0, depot; cvta.local.u64 %rd1, %rd0;
        st.local.u32 [%rd0+4], %i;
        ld.u32 %r0, [%rd1+4];
        st.global.u32 [%addr], %r0;
        """,
        out,
    )
    np.testing.assert_array_equal(out, np.arange(32))


def test_variables_with_values() -> None:
    out = np.zeros(4, np.uint32)
    run(
        """
        mov.u64 %rd0, tables; mad.wide.u32 %rd1, %i, 2, %rd0; ld.const.u16 %r0, [%rd1];
        ld.global.u32 %r1, [counter]; add.u32 %r0, %r0, %r1;
        st.global.u32 [%addr], %r0;
        """,
        out,
        block=4,
        outside=".const .align 2 .u16 tables[4] = {10, 20, 0x1E, 40};\n.global .u32 counter = 5;\n",
    )
    np.testing.assert_array_equal(out, [15, 25, 35, 45])


# --- control flow --------------------------------------------------------------------------------


def test_lanes_that_diverge_meet_again() -> None:
    """Collatz steps: every lane leaves the loop at another time, then a shuffle needs them all."""
    out = np.zeros(64, np.uint32)
    run(
        """
        add.u32 %r0, %i, 1;
        mov.u32 %r1, 0;
        LOOP:
        setp.eq.u32 %p, %r0, 1;
        @%p bra DONE;
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %q, %r2, 1;
        @%q bra ODD;
        shr.u32 %r0, %r0, 1;
        bra.uni NEXT;
        ODD:
        mad.lo.u32 %r0, %r0, 3, 1;
        NEXT:
        add.u32 %r1, %r1, 1;
        bra LOOP;
        DONE:
        shfl.sync.bfly.b32 %r3, %r1, 0, 31, -1;
        st.global.u32 [%addr], %r3;
        """,
        out,
        block=64,
    )

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    np.testing.assert_array_equal(out, [steps(n) for n in range(1, 65)])


def test_indirect_branches() -> None:
    out = np.zeros(8, np.uint32)
    run(
        """
        and.b32 %r0, %i, 3;
        T: .branchtargets A, B, C, B;
        brx.idx %r0, T;
        A: mov.u32 %r1, 100; bra END;
        B: mov.u32 %r1, 200; bra END;
        C: mov.u32 %r1, 300;
        END: st.global.u32 [%addr], %r1;
        """,
        out,
        block=8,
    )
    np.testing.assert_array_equal(out, [100, 200, 300, 200] * 2)


def test_a_lane_that_spins_does_not_starve_the_one_it_waits_for() -> None:
    out = np.zeros(64, np.uint32)
    run(
        """
        setp.lt.u32 %p, %i, 32;
        @!%p bra PRODUCE;
        SPIN:
        ld.volatile.global.u32 %r0, [%base+200];
        setp.eq.u32 %q, %r0, 0;
        @%q bra SPIN;
        st.global.u32 [%addr], %r0;
        bra END;
        PRODUCE:
        st.global.u32 [%base+200], 77;
        END:
        """,
        out,
        block=64,
    )
    assert (out[:32] == 77).all()


def test_a_kernel_that_does_not_end() -> None:
    with pytest.raises(PtxError, match="does not end"):
        load(kernel("L: bra L;", ""))["test"].run(1, 1, [], max_steps=1000)


def test_blocks_and_threads_in_three_dimensions() -> None:
    out = np.zeros((2, 3, 2, 2, 4, 3), np.uint32)  # block z, y, x, thread z, y, x
    axes = [("%ctaid", "%nctaid"), ("%tid", "%ntid")]
    order = [(i, s, a) for i, s in axes for a in "zyx"]
    body = "mov.u32 %r0, 0;" + "".join(
        f"mov.u32 %r1, {s}.{a}; mov.u32 %r2, {i}.{a}; mad.lo.u32 %r0, %r0, %r1, %r2;"
        for i, s, a in order
    )
    body += "mad.wide.u32 %addr, %r0, 4, %base; st.global.u32 [%addr], %r0;"
    run(body, out, grid=(2, 3, 2), block=(3, 4, 2))
    np.testing.assert_array_equal(out.reshape(-1), np.arange(out.size))


# --- barriers ------------------------------------------------------------------------------------


def test_a_barrier_that_a_part_of_the_warp_never_reaches() -> None:
    body = """
    setp.lt.u32 %p, %i, 16;
    @%p bra OTHER;
    bar.sync 0;
    bra END;
    OTHER:
    bar.sync 0;
    END:
    """
    with pytest.raises(PtxError, match="different barriers"):
        run(body, np.zeros(32, np.uint32))


def test_named_barriers_with_counts() -> None:
    """The second half of the block waits at another barrier than the first."""
    out = np.zeros(128, np.uint32)
    run(
        """
        mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 4, %r0; xor.b32 %r2, %i, 63;
        mad.lo.u32 %r2, %r2, 4, %r0;
        shr.u32 %r3, %i, 6; add.u32 %r3, %r3, 1;
        st.shared.u32 [%r1], %i;
        bar.sync %r3, 64;
        ld.shared.u32 %r4, [%r2]; st.global.u32 [%addr], %r4;
        """,
        out,
        block=128,
        outside=".shared .align 4 .b8 buffer[512];\n",
    )
    np.testing.assert_array_equal(out, np.arange(128) ^ 63)
    with pytest.raises(PtxError, match="deadlock: a barrier"):
        run("bar.sync 1, 64;", np.zeros(1, np.uint32), block=32)


def test_threads_that_exit_do_not_hold_the_others() -> None:
    out = np.zeros(64, np.uint32)
    body = "setp.ge.u32 %p, %i, 32; @%p ret; bar.sync 0; st.global.u32 [%addr], 1;"
    run(body, out, block=64)
    np.testing.assert_array_equal(out, np.arange(64) < 32)


# --- asynchronous copies -------------------------------------------------------------------------

COPY = """
mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 16, %r0;
mad.wide.u32 %rd0, %i, 16, %base;
ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd1, %i, 16, %rd1;
"""
READ = "ld.shared.v4.f32 {%f0, %f1, %f2, %f3}, [%r1];"
STORE = "st.global.v4.f32 [%rd1], {%f0, %f1, %f2, %f3};"
BUFFER = ".shared .align 16 .b8 buffer[512];\n"


def copied(body: str, source: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    source = RNG.standard_normal((32, 4)).astype(np.float32) if source is None else source
    out = np.zeros((32, 4), np.float32)
    run(COPY + body + STORE, source, out, outside=BUFFER)
    return source, out


def test_copies_land_when_they_are_waited_for() -> None:
    copy = "cp.async.cg.shared.global.L2::128B [%r1], [%rd0], 16; cp.async.commit_group;"
    source, out = copied(copy + "cp.async.wait_group 0;" + READ)
    np.testing.assert_array_equal(out, source)
    _, early = copied(copy + READ + "cp.async.wait_group 0;")
    assert np.isnan(early).all()
    # What was there before is gone as soon as the copy is issued.
    filled = "st.shared.v4.u32 [%r1], {%i, %i, %i, %i};"
    _, early = copied(filled + copy + READ + "cp.async.wait_group 0;")
    assert np.isnan(early).all()
    _, allowed = copied(copy + "cp.async.wait_group 1;" + READ)
    assert np.isnan(allowed).all()
    source, older = copied(copy + "cp.async.commit_group; cp.async.wait_group 1;" + READ)
    np.testing.assert_array_equal(older, source)
    uncommitted = "cp.async.ca.shared.global [%r1], [%rd0], 16;"
    _, out = copied(uncommitted + "cp.async.wait_group 0;" + READ)
    assert np.isnan(out).all()
    source, out = copied(uncommitted + "cp.async.wait_all;" + READ)
    np.testing.assert_array_equal(out, source)


def test_copies_fill_with_zeros() -> None:
    body = "and.b32 %r2, %i, 3; shl.b32 %r2, %r2, 2;"
    body += "cp.async.ca.shared.global [%r1], [%rd0], 16, %r2; cp.async.wait_all;" + READ
    source, out = copied(body)
    have = np.arange(4) < (np.arange(32) & 3)[:, None]
    np.testing.assert_array_equal(out, np.where(have, source, 0))


def test_a_copy_of_nothing_reads_nothing() -> None:
    body = "setp.lt.u32 %p, %i, 8; selp.b32 %r2, 16, 0, %p;"
    body += "cp.async.cg.shared.global [%r1], [%rd0], 16, %r2; cp.async.wait_all;" + READ
    source, out = copied(body, np.ones((8, 4), np.float32))
    np.testing.assert_array_equal(out, np.repeat([1.0, 0.0], [8, 24])[:, None] * np.ones((1, 4)))
    whole = "cp.async.cg.shared.global [%r1], [%rd0], 16; cp.async.wait_all;" + READ
    with pytest.raises(PtxError, match=r"cp\.async.*out of bounds.*thread \(8, "):
        copied(whole, source)


def test_copies_are_aligned() -> None:
    body = "cp.async.cg.shared.global [%r1], [%rd0+8], 16;" + READ
    with pytest.raises(PtxError, match=r"global address .* not a multiple of 16"):
        copied(body)
    body = "cp.async.ca.shared.global [%r1+4], [%rd0], 8;" + READ
    with pytest.raises(PtxError, match=r"shared.* not a multiple of 8"):
        copied(body)


# --- atomics -------------------------------------------------------------------------------------


def test_atomics() -> None:
    sums = np.zeros(4, np.float32)
    run(
        """
        and.b32 %r0, %i, 3; mad.wide.u32 %addr, %r0, 4, %base;
        cvt.rn.f32.u32 %f0, %i; red.global.add.f32 [%addr], %f0;
        """,
        sums,
        block=64,
    )
    np.testing.assert_array_equal(sums, [sum(range(r, 64, 4)) for r in range(4)])

    tickets = np.zeros(65, np.uint32)
    run("atom.global.add.u32 %r0, [%base+256], 1; st.global.u32 [%addr], %r0;", tickets, block=64)
    assert sorted(tickets[:64].tolist()) == list(range(64))
    assert tickets[64] == 64

    largest = np.zeros(1, np.int32)
    run("xor.b32 %r0, %i, 21; atom.global.max.s32 %r1, [%base], %r0;", largest)
    assert largest[0] == 31

    winner = np.zeros(33, np.uint32)
    body = "add.u32 %r0, %i, 1; atom.global.cas.b32 %r1, [%base+128], 0, %r0;"
    run(body + "st.global.u32 [%addr], %r1;", winner)
    assert (winner[:32] == 0).sum() == 1
    assert winner[32] == 1 + np.flatnonzero(winner[:32] == 0)[0]


# --- warps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, width: int) -> None:
    value = RNG.integers(0, 1 << 31, 64).astype(np.uint32)
    by = 5 if mode == "idx" else 4
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 %d|%p, %a, {by}, {clamp}, 0xffffffff;"
    got = evaluate(text, "u32", ("u32", value))
    inside = evaluate(text.replace("%d|%p", "%tmp|%d"), "pred", ("u32", value))
    lane = np.arange(64)
    start, place = lane // width * width, lane % width
    source = {
        "up": place - by,
        "down": place + by,
        "bfly": place ^ by,
        "idx": np.full(64, by),
    }[mode]
    valid = (source >= 0) & (source < width)
    np.testing.assert_array_equal(got, value[np.where(valid, start + source, lane)])
    np.testing.assert_array_equal(inside, valid)


def test_a_shuffle_waits_for_its_members_only() -> None:
    out = np.zeros(32, np.uint32)
    run(
        """
        setp.lt.u32 %p, %i, 16;
        @!%p bra UPPER;
        shfl.sync.bfly.b32 %r0, %i, 1, 31, 0xffff;
        bra END;
        UPPER:
        shfl.sync.bfly.b32 %r0, %i, 2, 31, 0xffff0000;
        END:
        st.global.u32 [%addr], %r0;
        """,
        out,
    )
    lane = np.arange(32)
    np.testing.assert_array_equal(out, np.where(lane < 16, lane ^ 1, lane ^ 2))


def test_a_shuffle_that_some_members_never_reach() -> None:
    body = "setp.lt.u32 %p, %i, 16; @%p bra END; shfl.sync.bfly.b32 %r0, %i, 1, 31, -1; END:"
    body += "mov.u32 %r1, 0; L: add.u32 %r1, %r1, 1; setp.lt.u32 %q, %r1, 3; @%q bra L; bar.sync 0;"
    with pytest.raises(PtxError, match=r"shfl\.sync.*deadlock: a warp-wide"):
        run(body, np.zeros(32, np.uint32))


def test_a_shuffle_does_not_read_lanes_that_left() -> None:
    body = "setp.ge.u32 %p, %i, 16; @%p ret; shfl.sync.idx.b32 %r0, %i, 20, 31, -1;"
    with pytest.raises(PtxError, match="does not take part"):
        run(body, np.zeros(32, np.uint32))


def test_votes() -> None:
    a = RNG.integers(0, 2, 64).astype(np.uint32)
    a[32:] = 1
    test = "setp.ne.u32 %p, %a, 0;"
    got = evaluate(test + "vote.sync.ballot.b32 %d, %p, -1;", "u32", ("u32", a))
    words = [sum(int(bit) << n for n, bit in enumerate(a[w : w + 32])) for w in (0, 32)]
    np.testing.assert_array_equal(got, np.repeat(np.array(words, np.uint32), 32))
    for name, expected in {"all": [False, True], "any": [True, True], "uni": [False, True]}.items():
        got = evaluate(test + f"vote.sync.{name}.pred %d, %p, -1;", "pred", ("u32", a))
        np.testing.assert_array_equal(got, np.repeat(expected, 32))
    got = evaluate("redux.sync.add.s32 %d, %a, -1;", "s32", ("u32", a))
    np.testing.assert_array_equal(got, np.repeat([a[:32].sum(), 32], 32))
    got = evaluate("elect.sync %tmp|%d, -1;", "pred", lanes=64)
    np.testing.assert_array_equal(got, np.arange(64) % 32 == 0)


# --- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, trans: bool) -> None:
    matrices = RNG.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    fragments = np.zeros((count, 32), np.uint32)
    back = np.zeros((4, 8, 8), np.uint16)
    names = ", ".join(f"%v{n}" for n in range(count))
    suffix = f"x{count}{'.trans' if trans else ''}.shared.b16"
    stores = "".join(f"st.global.u32 [%rd1+{128 * n}], %v{n};" for n in range(count))
    run(
        f"""
        mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 16, %r0;
        mad.wide.u32 %rd0, %i, 16, %base;
        ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd0];
        st.shared.v4.u32 [%r1], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.{suffix} {{{names}}}, [%r1];
        ld.param.u64 %rd1, [p1]; mad.wide.u32 %rd1, %i, 4, %rd1; {stores}
        stmatrix.sync.aligned.m8n8.{suffix} [%r1], {{{names}}};
        bar.sync 0;
        ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1];
        ld.param.u64 %rd2, [p2]; mad.wide.u32 %rd2, %i, 16, %rd2;
        st.global.v4.u32 [%rd2], {{%r4, %r5, %r6, %r7}};
        """,
        matrices,
        fragments,
        back,
        outside=BUFFER,
    )
    np.testing.assert_array_equal(back, matrices)
    for m in range(count):
        matrix = matrices[m].T if trans else matrices[m]
        # Lane 4 r + c holds elements 2 c and 2 c + 1 of row r.
        expected = [matrix[lane // 4, 2 * (lane % 4) :][:2].tolist() for lane in range(32)]
        assert fragments[m].view(np.uint16).reshape(32, 2).tolist() == expected


def test_ldmatrix_checks_its_rows() -> None:
    body = "mov.u32 %r0, buffer; mad.lo.u32 %r1, %i, 8, %r0;"
    body += "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"
    with pytest.raises(PtxError, match=r"ldmatrix.*not a multiple of 16.*thread \(1, "):
        run(body, np.zeros(1, np.uint32), outside=BUFFER)


def test_mma_needs_the_whole_warp() -> None:
    body = "setp.lt.u32 %p, %i, 31; @!%p bra END; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32."
    body += "f32 {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};"
    with pytest.raises(PtxError, match=r"mma\.sync.*deadlock"):
        run(body + "END:", np.zeros(1, np.uint32))


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray, name: str, d_kind: str = "f32") -> np.ndarray:
    """D of one mma, its fragments gathered here by the tables of the PTX ISA."""
    k = a.shape[1]
    lane = np.arange(32)
    group, t = lane // 4, lane % 4
    per = 4 // a.itemsize  # elements a register
    rows_of_a, ks_of_a = [], []
    for number in range(4 if k * a.itemsize == 32 else 2):
        rows_of_a.append(group + 8 * (number % 2))
        ks_of_a.append(4 * per * (number // 2) + per * t)
    ks_of_b = [4 * per * number + per * t for number in range(2 if k * a.itemsize == 32 else 1)]

    def word(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values).view(np.uint32).reshape(32)

    along = np.arange(per)
    registers = [
        word(a[r[:, None], s[:, None] + along]) for r, s in zip(rows_of_a, ks_of_a, strict=True)
    ]
    registers += [word(b[s[:, None] + along, group[:, None]]) for s in ks_of_b]
    places = [(group + 8 * (n // 2), 2 * t + n % 2) for n in range(4)]
    if d_kind == "f32":
        registers += [c[p].view(np.uint32) for p in places]
    else:
        registers += [
            word(np.stack([c[places[n]], c[places[n + 1]]], 1).astype(np.float16)) for n in (0, 2)
        ]
    source = np.array(registers)
    na, nb = len(rows_of_a), len(ks_of_b)
    nc = len(registers) - na - nb
    out = np.zeros((nc, 32), np.uint32)
    names = [f"%v{n}" for n in range(na + nb + nc)]
    loads = "".join(f"ld.global.u32 {v}, [%addr+{128 * n}];" for n, v in enumerate(names))
    stores = "".join(
        f"st.global.u32 [%rd0+{128 * n}], {v};" for n, v in enumerate(names[na + nb :])
    )
    lists = [names[:na], names[na : na + nb], names[na + nb :]]
    text = [f"{{{', '.join(part)}}}" for part in (lists[2], *lists)]
    body = f"""
    .reg .b32 %w;
    {loads}
    mma.sync.aligned.{name} {", ".join(text)};
    ld.param.u64 %rd0, [p1]; mad.wide.u32 %rd0, %i, 4, %rd0;
    {stores}
    """
    registers_needed = LANE.replace("%v<8>", "%v<16>")
    module = load(kernel(registers_needed + body, ".param .u64 p0, .param .u64 p1"))
    module["test"].run(1, 32, [source, out])
    d = np.zeros((16, 8))
    for n, place in enumerate(places):
        if d_kind == "f32":
            d[place] = out[n].view(np.float32)
        else:
            d[place] = out[n // 2].view(np.float16).reshape(32, 2)[:, n % 2]
    return d


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("d_kind", ["f32", "f16"])
def test_mma_f16(k: int, d_kind: str) -> None:
    a, b = RNG.standard_normal((16, k)), RNG.standard_normal((k, 8))
    a, b = a.astype(np.float16), b.astype(np.float16)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    if d_kind == "f16":
        c = c.astype(np.float16).astype(np.float32)
    got = mma(a, b, c, f"m16n8k{k}.row.col.{d_kind}.f16.f16.{d_kind}", d_kind)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    out = np.float32 if d_kind == "f32" else np.float16
    np.testing.assert_array_equal(got, exact.astype(out).astype(np.float64))


@pytest.mark.parametrize("k", [8, 16])
def test_mma_bf16(k: int) -> None:
    values = [RNG.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8))]
    bits = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in values[:2]]
    got = mma(bits[0], bits[1], values[2], f"m16n8k{k}.row.col.f32.bf16.bf16.f32")
    a, b = ((v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in bits)
    np.testing.assert_array_equal(got, (a @ b + values[2]).astype(np.float32))


@pytest.mark.parametrize("k", [4, 8])
def test_mma_tf32_ignores_the_low_bits(k: int) -> None:
    a, b, c = (RNG.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8)))
    got = mma(a, b, c, f"m16n8k{k}.row.col.f32.tf32.tf32.f32")
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    np.testing.assert_array_equal(got, (cut[0] @ cut[1] + c).astype(np.float32))
    assert not np.array_equal(got, (a.astype(np.float64) @ b + c).astype(np.float32))
