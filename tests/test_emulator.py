"""The emulator of tests/emulator against numpy, and against kernels with one known defect each."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import (
    PLACEMENTS,
    SCHEDULES,
    Buffer,
    BuildError,
    Emulator,
    KernelError,
    Output,
    Report,
)
from tests.emulator.build import build_kernels
from tests.emulator.project import INCLUDE

SOURCE = Path(__file__).parent / "emulator" / "selftest.cpp"
RNG = np.random.default_rng(0)

both = pytest.mark.parametrize("emulator", [False, True], ids=["fast", "checked"], indirect=True)
checked = pytest.mark.parametrize("emulator", [True], ids=["checked"], indirect=True)
fast = pytest.mark.parametrize("emulator", [False], ids=["fast"], indirect=True)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
placements = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(scope="module")
def libraries() -> dict[bool, Emulator]:
    return {c: Emulator([SOURCE], checked=c, include=INCLUDE) for c in (False, True)}


@pytest.fixture
def emulator(request: pytest.FixtureRequest, libraries: dict[bool, Emulator]) -> Emulator:
    return libraries[request.param]


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def line_of(text: str) -> int:
    """The line of the self-test's source that contains the text."""
    (line,) = [i for i, s in enumerate(SOURCE.read_text().splitlines(), 1) if text in s]
    return line


def lines(report: Report, kind: str) -> set[tuple[int, ...]]:
    """The lines of each finding of a kind."""
    return {tuple(p.line for p in f.places) for f in report.findings if f.kind == kind}


# ---- Right kernels -------------------------------------------------------------------------------


def row_sum(emulator: Emulator, kernel: str, **options: object) -> tuple[np.ndarray, Report]:
    x, y = random(5, 1000), np.zeros(5, np.float32)
    arguments = {"x": x, "y": Output(y), "columns": 1000}
    report = emulator.launch(kernel, arguments, grid=5, block=128, **options)
    return y - x.sum(1, dtype=np.float64), report


@both
@schedules
def test_block_reduction(emulator: Emulator, schedule: str) -> None:
    error, report = row_sum(emulator, "row_sum", schedule=schedule, seed=3)
    report.raise_findings()
    assert np.abs(error).max() < 1e-4
    assert report.counters["blocks"] == 5
    assert report.counters["barriers"] == 5
    assert report.counters["static_shared_bytes"] == 128


@both
@schedules
@pytest.mark.parametrize("kernel", ["transpose/padded", "transpose/unpadded"])
def test_transpose(emulator: Emulator, schedule: str, kernel: str) -> None:
    x, y = random(70, 45), np.zeros((45, 70), np.float32)
    arguments = {"x": x, "y": Output(y), "rows": 70, "columns": 45}
    report = emulator.launch(kernel, arguments, grid=(2, 3), block=(32, 8), schedule=schedule)
    report.raise_findings()
    assert np.array_equal(y, x.T)


@both
@schedules
def test_warps_that_synchronise_alone(emulator: Emulator, schedule: str) -> None:
    x, y = random(128), np.zeros(128, np.float32)
    report = emulator.launch(
        "warp_reverse", {"x": x, "y": Output(y)}, grid=1, block=128, schedule=schedule
    )
    report.raise_findings()
    assert np.array_equal(y, (x + 1) + 1)


def pipeline(emulator: Emulator, kernel: str, schedule: str) -> tuple[bool, Report]:
    x, y = random(5, 512), np.zeros((5, 512), np.float32)
    report = emulator.launch(
        kernel,
        {"x": x, "y": Output(y), "tiles": 5},
        grid=1,
        block=128,
        shared_bytes=4096,
        schedule=schedule,
    )
    return np.array_equal(y, np.roll(x, -1, axis=1) + 1), report


@both
@schedules
def test_double_buffered_copies(emulator: Emulator, schedule: str) -> None:
    right, report = pipeline(emulator, "pipeline", schedule)
    report.raise_findings()
    assert right
    assert report.counters["cp_async"] == 5 * 128


@both
@schedules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_matrix_product(emulator: Emulator, schedule: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in "ab")
    c = torch.zeros(32, 32)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    report = emulator.launch(
        f"matrix_product/{name}",
        {"a": a, "b": b, "c": Output(c)},
        grid=1,
        block=32,
        schedule=schedule,
    )
    report.raise_findings()
    # The products of 16-bit operands are exact in fp32; what is left is the rounding of 32 sums.
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=2e-5)
    assert report.counters[f"mma_{'f16' if name == 'fp16' else name}"] == 2 * 2 * 4


def truncate_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, ties away from zero."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    scaled = mantissa * 2**11
    return np.ldexp(np.trunc(scaled + np.copysign(0.5, scaled)) / 2**11, exponent)


@both
def test_matrix_product_tf32(emulator: Emulator) -> None:
    a, b, c = random(16, 8), random(8, 8), np.zeros((16, 8), np.float32)
    report = emulator.launch(
        "matrix_product/tf32", {"a": a, "b": b, "c": Output(c)}, grid=1, block=32
    )
    report.raise_findings()
    np.testing.assert_allclose(c, truncate_to_tf32(a) @ truncate_to_tf32(b), rtol=0, atol=2e-6)
    assert np.abs(c - a @ b).max() > 1e-4


@both
def test_mma_cuts_tf32_operands(emulator: Emulator) -> None:
    a, b, c = random(16, 8), random(8, 8), np.zeros((16, 8), np.float32)
    arguments = {"a": a, "b": b, "c": Output(c)}
    emulator.launch("matrix_product/tf32_cut", arguments, grid=1, block=32).raise_findings()
    cut_a, cut_b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    np.testing.assert_allclose(c, cut_a.astype(float) @ cut_b, rtol=0, atol=2e-6)


@both
@pytest.mark.parametrize("width", [4, 8, 16])
def test_copies_fill_with_zeros(emulator: Emulator, width: int) -> None:
    elements = 8 * width
    x, y = random(elements), np.ones(elements, np.float32)
    count = elements // 2
    # What is not copied is not read either: it does not exist.
    report = emulator.launch(
        f"copy_or_zero/{width}",
        {"x": x[:count], "y": Output(y), "count": count},
        grid=1,
        block=32,
        placement="right",
    )
    report.raise_findings()
    assert np.array_equal(y, np.where(np.arange(elements) < count, x, 0))


@both
@placements
@pytest.mark.parametrize("count", [1, 3, 4, 5, 403, 1024])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_ragged_copy(emulator: Emulator, placement: str, count: int, dtype: type) -> None:
    x, y = RNG.integers(0, 200, count).astype(dtype), np.zeros(count, dtype)
    name = {np.float32: "fp32", np.uint8: "uint8"}[dtype]
    report = emulator.launch(
        f"copy/{name}",
        {"x": x, "y": Output(y), "count": count},
        grid=2,
        block=32,
        placement=placement,
    )
    report.raise_findings()
    assert np.array_equal(x, y)


@both
@schedules
def test_split_reduction(emulator: Emulator, schedule: str) -> None:
    report, error, counter = split_sum(emulator, "split_sum", schedule)
    report.raise_findings()
    assert abs(error) < 1e-3
    assert counter == 0


def split_sum(emulator: Emulator, kernel: str, schedule: str) -> tuple[Report, float, int]:
    x, y, counter = random(5000), np.zeros(1, np.float32), np.zeros(1, np.int32)
    arguments = {
        "x": x,
        "partials": Output(np.zeros(4 * 64, np.float32)),
        "counter": counter,
        "y": Output(y),
        "count": 5000,
    }
    report = emulator.launch(kernel, arguments, grid=4, block=64, schedule=schedule, seed=1)
    return report, float(y[0] - x.sum(dtype=np.float64)), int(counter[0])


@both
@schedules
def test_collectives(emulator: Emulator, schedule: str) -> None:
    y = np.zeros((8, 32), np.int32)
    report = emulator.launch("collectives", {"y": y}, grid=1, block=32, schedule=schedule)
    report.raise_findings()
    lane = np.arange(32)
    expected = [
        np.full(32, 50),
        np.where(lane >= 3, lane - 3, lane),
        np.where(lane < 29, lane + 3, lane),
        lane ^ 7,
        np.full(32, sum(1 << i for i in range(0, 32, 3))).astype(np.uint32).astype(np.int32),
        np.ones(32),
        np.zeros(32),
        np.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    assert np.array_equal(y, expected)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_conversions_round_as_torch_does(emulator: Emulator, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 65504, 65519, 65520, 1e5, 6e-8, 3e-8, 1e-9, 1 + 2**-11, 1 + 3 * 2**-11]
    special += [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), float("-inf"), float("nan"), -1e-40]
    x = torch.cat([torch.tensor(special), torch.randn(110)])
    y = torch.zeros(2, 128)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    emulator.launch(
        f"round_trip/{name}", {"x": x, "y": Output(y), "count": 128}, grid=1, block=64
    ).raise_findings()
    torch.testing.assert_close(y[0], x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y[1], x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@both
def test_tf32_rounds_ties_away_from_zero(emulator: Emulator) -> None:
    x = np.concatenate([[1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 0, np.inf, -np.inf], random(26)])
    x, y = x.astype(np.float32), np.zeros(32, np.float32)
    emulator.launch("round_trip/tf32", {"x": x, "y": Output(y)}, grid=1, block=32).raise_findings()
    finite = np.isfinite(x)
    assert np.array_equal(y[finite], truncate_to_tf32(x[finite]))
    assert np.array_equal(y[~finite], x[~finite])


class Extents(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int), ("columns", ctypes.c_int)]


@both
@schedules
def test_coordinates_and_structure_arguments(emulator: Emulator, schedule: str) -> None:
    y = np.zeros((24, 30), np.int32)
    report = emulator.launch(
        "coordinates",
        {"y": Output(y), "extents": Extents(24, 30)},
        grid=(2, 3, 4),
        block=(5, 3, 2),
        schedule=schedule,
    )
    report.raise_findings()
    assert np.array_equal(y.ravel(), np.arange(24 * 30))


class Numbers(ctypes.Structure):
    _fields_ = [("values", ctypes.c_int * 960)]


@both
def test_a_large_structure_argument_is_no_memory_of_the_kernel(emulator: Emulator) -> None:
    y = np.zeros(960, np.int32)
    numbers = Numbers((ctypes.c_int * 960)(*range(960)))
    report = emulator.launch(
        "large_argument", {"y": Output(y), "numbers": numbers}, grid=1, block=32
    )
    report.raise_findings()
    assert np.array_equal(y, np.arange(960))


@both
def test_order_of_blocks(emulator: Emulator) -> None:
    orders = {}
    for schedule in SCHEDULES:
        y = np.zeros(20, np.int32)
        arguments = {"counter": np.zeros(1, np.int32), "y": Output(y)}
        emulator.launch("tickets", arguments, grid=20, block=1, schedule=schedule).raise_findings()
        orders[schedule] = y.tolist()
    assert orders["depth_first"] == list(range(20))
    assert orders["fifo"] == list(range(19, -1, -1))
    assert sorted(orders["random"]) == list(range(20))
    assert orders["random"] not in (orders["depth_first"], orders["fifo"])


@both
def test_random_schedule_depends_on_its_seed_only(emulator: Emulator) -> None:
    def place(seed: int) -> tuple[int, int]:
        report = row_sum(emulator, "row_sum/early_exit", schedule="random", seed=seed)[1]
        first = report.findings[0].places[0]
        return first.block, first.thread

    places = [place(seed) for seed in range(6)]
    assert places == [place(seed) for seed in range(6)]
    assert len(set(places)) > 1


# ---- Defects -------------------------------------------------------------------------------------


@checked
@schedules
def test_missing_barrier_is_a_race_in_every_schedule(emulator: Emulator, schedule: str) -> None:
    report = row_sum(emulator, "row_sum/missing_barrier", schedule=schedule)[1]
    write, read = line_of("partial[warp] = sum"), line_of("? partial[lane]")
    assert lines(report, "race") <= {(read, write), (write, read)}
    assert lines(report, "race")
    race = next(f for f in report.findings if f.kind == "race")
    assert race.places[0].thread != race.places[1].thread


@fast
def test_missing_barrier_can_pass_the_fast_build(emulator: Emulator) -> None:
    error, report = row_sum(emulator, "row_sum/missing_barrier", schedule="fifo")
    assert np.abs(error).max() < 1e-4
    assert not report.findings


@checked
@schedules
def test_missing_barrier_in_a_pipeline(emulator: Emulator, schedule: str) -> None:
    report = pipeline(emulator, "pipeline/missing_barrier", schedule)[1]
    copy, read = line_of("cp_async<16>(buffers"), line_of("buffer[(i + 1) % kTile]")
    assert (copy, read) in lines(report, "race")


@checked
@schedules
@pytest.mark.parametrize("kernel", ["pipeline/loose_wait", "pipeline/no_wait"])
def test_too_loose_wait_is_an_in_flight_read(
    emulator: Emulator, schedule: str, kernel: str
) -> None:
    right, report = pipeline(emulator, kernel, schedule)
    copy, read = line_of("cp_async<16>(buffers"), line_of("buffer[(i + 1) % kTile]")
    assert (read, copy) in lines(report, "in-flight")
    assert (copy,) in lines(report, "copy-not-awaited")
    assert not right


@both
def test_copy_in_flight_is_nan(emulator: Emulator) -> None:
    y = np.zeros(32, np.float32)
    report = emulator.launch(
        "read_before_wait", {"x": random(32), "y": Output(y)}, grid=1, block=32
    )
    assert np.isnan(y).all()
    assert report.kinds == ({"in-flight"} if emulator.checked else set())


@fast
@schedules
def test_too_loose_wait_is_wrong_in_the_fast_build(emulator: Emulator, schedule: str) -> None:
    assert not pipeline(emulator, "pipeline/loose_wait", schedule)[0]


@fast
def test_shared_memory_starts_as_nan(emulator: Emulator) -> None:
    for memory in ("static", "dynamic"):
        y = np.zeros(32, np.float32)
        emulator.launch(
            f"shared_out_of_bounds/{memory}",
            {"y": Output(y), "index": 1},
            grid=1,
            block=32,
            shared_bytes=256,
        )
        assert np.isnan(y[31]) == (memory == "dynamic")
        assert np.array_equal(y[:31], np.ones(31))


@checked
@schedules
def test_missing_warp_barrier(emulator: Emulator, schedule: str) -> None:
    report = emulator.launch(
        "warp_reverse/missing_warp_barrier",
        {"x": random(64), "y": np.zeros(64, np.float32)},
        grid=1,
        block=64,
        schedule=schedule,
    )
    write, read = line_of("mine[lane] ="), line_of("mine[31 - lane]")
    assert lines(report, "race") & {(write, read), (read, write)}


@checked
@schedules
def test_uninitialised_shared_memory(emulator: Emulator, schedule: str) -> None:
    report = row_sum(emulator, "row_sum/uninitialised", schedule=schedule)[1]
    assert lines(report, "uninitialised") == {(line_of("? partial[lane]"),)}
    assert report.kinds == {"uninitialised"}


@both
@schedules
def test_divergent_barrier(emulator: Emulator, schedule: str) -> None:
    report = row_sum(emulator, "row_sum/divergent_barrier", schedule=schedule)[1]
    (finding,) = report.findings
    assert (finding.kind, finding.fatal) == ("divergent-barrier", True)
    assert "thread 5" in finding.message or finding.places[0].thread != 5


@both
@schedules
def test_barrier_after_exit(emulator: Emulator, schedule: str) -> None:
    kinds = row_sum(emulator, "row_sum/early_exit", schedule=schedule)[1].kinds
    assert kinds & {"barrier-after-exit", "exit-before-barrier"}
    if schedule == "depth_first":
        # Warp 0 has returned when warp 1 comes to the barrier, where it is when warp 2 returns.
        assert kinds >= {"barrier-after-exit", "exit-before-barrier"}


@checked
def test_wrong_space(emulator: Emulator) -> None:
    arguments = {"x": random(32, 4), "y": Output(np.zeros(32, np.float32))}
    report = emulator.launch("wrong_space", arguments, grid=1, block=32)
    assert report.kinds == {"wrong-space"}
    assert sum(finding.count for finding in report.findings) == 2 * 32


@both
@schedules
def test_divergent_collective(emulator: Emulator, schedule: str) -> None:
    report = row_sum(emulator, "row_sum/divergent_collective", schedule=schedule)[1]
    (finding,) = report.findings
    assert (finding.kind, finding.fatal) == ("divergent-collective", True)


@both
@schedules
def test_deadlock(emulator: Emulator, schedule: str) -> None:
    report = row_sum(emulator, "row_sum/deadlock", schedule=schedule)[1]
    (deadlock,) = [f for f in report.findings if f.kind == "deadlock"]
    assert deadlock.fatal
    assert "thread 7 at __syncwarp" in deadlock.message
    assert "thread 8 at __syncthreads" in deadlock.message


@both
def test_endless_loop(emulator: Emulator) -> None:
    flag = np.zeros(1, np.int32)
    report = emulator.launch("spin", {"flag": flag}, grid=1, block=32, cpu_seconds=0.2)
    assert lines(report, "timeout") <= {(line_of("while (*flag == 0)"),)}
    assert report.kinds == {"timeout"}


def copy(emulator: Emulator, kernel: str, **options: object) -> Report:
    x, y = random(403), np.zeros(403, np.float32)
    arguments = {"x": x, "y": Output(y), "count": 403}
    return emulator.launch(kernel, arguments, grid=13, block=32, **options)


@checked
@placements
@pytest.mark.parametrize("bug", ["past_end", "before_begin"])
def test_out_of_bounds(emulator: Emulator, placement: str, bug: str) -> None:
    report = copy(emulator, f"copy/{bug}", placement=placement)
    assert (line_of("load_global<uint4>(x"),) in lines(report, "out-of-bounds")
    assert "buffer 'x' (1612 bytes)" in str(report)
    report = copy(emulator, f"shift_copy/{bug}", placement=placement)
    assert lines(report, "out-of-bounds") == {(line_of("bug == kPastEnd ? 1 : -1"),)}


@fast
@pytest.mark.parametrize(("bug", "placement"), [("past_end", "right"), ("before_begin", "left")])
def test_guard_pages_stop_the_fast_build(emulator: Emulator, bug: str, placement: str) -> None:
    report = copy(emulator, f"shift_copy/{bug}", placement=placement, alignment=4)
    (finding,) = report.findings
    assert (finding.kind, finding.fatal) == ("out-of-bounds", True)
    assert finding.places[0].line == line_of("bug == kPastEnd ? 1 : -1")


@fast
def test_overwritten_margin_is_seen_by_the_fast_build(emulator: Emulator) -> None:
    x, y = random(403), np.zeros(401, np.float32)
    report = emulator.launch(
        "copy/fp32", {"x": x, "y": Output(y), "count": 403}, grid=2, block=32, alignment=16
    )
    assert "next to buffer 'y'" in str(report)


@both
def test_misaligned(emulator: Emulator) -> None:
    report = copy(emulator, "copy/misaligned")
    assert lines(report, "misaligned") == {(line_of("load_global<uint4>(x"),)}


@both
def test_misaligned_buffer(emulator: Emulator) -> None:
    report = copy(emulator, "copy/fp32", alignment=4)
    assert report.kinds == {"misaligned"}


@checked
@pytest.mark.parametrize("memory", ["static", "dynamic"])
@pytest.mark.parametrize("index", [1, 2000, -1, -4000])
def test_shared_out_of_bounds(emulator: Emulator, memory: str, index: int) -> None:
    y = np.zeros(32, np.float32)
    kernel = f"shared_out_of_bounds/{memory}"
    good, bad = (
        emulator.launch(kernel, {"y": Output(y), "index": i}, grid=1, block=32, shared_bytes=128)
        for i in (0, index)
    )
    assert not good.findings
    assert lines(bad, "out-of-bounds") == {(line_of("shared[static_cast<int>(threadIdx.x)"),)}
    assert bad.kinds <= {"out-of-bounds", "uninitialised"}


@checked
@schedules
@pytest.mark.parametrize("stride", [2, 64], ids=["threads", "blocks"])
def test_output_written_twice(emulator: Emulator, schedule: str, stride: int) -> None:
    y = np.zeros(128 // stride, np.float32)
    report = emulator.launch(
        "write_twice", {"y": Output(y), "stride": stride}, grid=2, block=64, schedule=schedule
    )
    line = line_of("/ stride] = 1.0f")
    assert lines(report, "global-race") == {(line, line)}


@checked
def test_output_written_by_two_blocks(emulator: Emulator) -> None:
    y = np.zeros(1, np.float32)
    report = emulator.launch("write_twice", {"y": Output(y), "stride": 2}, grid=2, block=1)
    (finding,) = report.findings
    assert {place.block for place in finding.places} == {0, 1}


@checked
@schedules
def test_in_place_update_of_a_neighbour(emulator: Emulator, schedule: str) -> None:
    arguments = {"y": random(64), "count": 64}
    report = emulator.launch("add_neighbour", arguments, grid=2, block=32, schedule=schedule)
    assert report.kinds == {"global-race"}


@checked
@schedules
def test_one_of_many_readers_writes(emulator: Emulator, schedule: str) -> None:
    write, read = line_of("value[0] = 2.0f"), line_of("y[threadIdx.x] = value[0]")
    for writer in range(64):
        arguments = {"y": Output(np.zeros(64, np.float32)), "writer": writer}
        report = emulator.launch("replace_shared", arguments, grid=1, block=64, schedule=schedule)
        assert lines(report, "race") <= {(write, read), (read, write)}
        assert lines(report, "race")


@checked
@schedules
def test_block_writes_what_another_block_reads(emulator: Emulator, schedule: str) -> None:
    arguments = {"x": random(1), "y": Output(np.zeros(64, np.float32))}
    report = emulator.launch("replace_global", arguments, grid=2, block=32, schedule=schedule)
    write, read = line_of("x[0] = 2.0f"), line_of("threadIdx.x] = x[0]")
    assert lines(report, "global-race") <= {(write, read), (read, write)}
    assert lines(report, "global-race")


@checked
@schedules
@pytest.mark.parametrize("bug", ["missing_fence", "missing_acquire", "missing_atomic"])
def test_split_reduction_race(emulator: Emulator, schedule: str, bug: str) -> None:
    report = split_sum(emulator, f"split_sum/{bug}", schedule)[0]
    write, read = line_of("+ t] = sum"), line_of("sum += partials[")
    assert lines(report, "global-race") <= {(read, write), (write, read)}
    assert lines(report, "global-race")


@checked
def test_uninitialised_global_memory(emulator: Emulator) -> None:
    arguments = {"y": Output(np.zeros(64, np.float32)), "count": 2}
    report = emulator.launch("add_neighbour", arguments, grid=1, block=32)
    assert "uninitialised" in report.kinds


@both
@pytest.mark.parametrize(
    ("kernel", "kind"), [("write_const", "read-only"), ("write_null", "out-of-bounds")]
)
def test_write_where_nothing_may_be_written(emulator: Emulator, kernel: str, kind: str) -> None:
    x = None if kernel == "write_null" else random(32)
    report = emulator.launch(kernel, {"x": x}, grid=1, block=32)
    (finding,) = report.findings
    assert (finding.kind, finding.fatal) == (kind, True)


@both
def test_stack_overflow(emulator: Emulator) -> None:
    y = np.zeros(1, np.int32)
    report = emulator.launch("recurse", {"y": y, "depth": 1000}, grid=1, block=32)
    assert "stack-overflow" in report.kinds


@both
def test_a_launch_works_after_one_that_failed(emulator: Emulator) -> None:
    emulator.launch("write_null", {"x": None}, grid=1, block=32)
    error, report = row_sum(emulator, "row_sum")
    report.raise_findings()
    assert np.abs(error).max() < 1e-4


@both
def test_findings_raise(emulator: Emulator) -> None:
    report = row_sum(emulator, "row_sum/deadlock")[1]
    with pytest.raises(KernelError, match="deadlock"):
        report.raise_findings()


# ---- Counts --------------------------------------------------------------------------------------


def transpose_report(emulator: Emulator, kernel: str) -> Report:
    x, y = random(64, 64), np.zeros((64, 64), np.float32)
    arguments = {"x": x, "y": Output(y), "rows": 64, "columns": 64}
    return emulator.launch(kernel, arguments, grid=(2, 2), block=(32, 8))


@checked
def test_bank_conflicts(emulator: Emulator) -> None:
    padded = transpose_report(emulator, "transpose/padded")
    unpadded = transpose_report(emulator, "transpose/unpadded")
    assert padded.conflicts("shared_load") == padded.conflicts("shared_store") == 1
    assert unpadded.conflicts("shared_load") == 32
    assert unpadded.conflicts("shared_store") == 1
    assert padded.conflicts("global_load") == padded.conflicts("global_store") == 1
    (load,) = [i for i in unpadded.instructions if i.kind == "shared_load"]
    assert load.place.line == line_of("= tile[threadIdx.x][i]")
    assert (load.width, load.executed, load.cost) == (4, 4 * 32, 4 * 32 * 32)


@checked
def test_broadcasts_and_vectors_do_not_conflict(emulator: Emulator) -> None:
    y = np.zeros(32, np.float32)
    report = emulator.launch("free_of_conflicts", {"y": Output(y)}, grid=1, block=32)
    report.raise_findings()
    lane = np.arange(32)
    assert np.array_equal(y, lane + lane // 2 + 7 + 3)
    for kind in ("shared_load", "shared_store", "ldmatrix"):
        assert report.conflicts(kind) == 1
    cost = {i.width: i.cost for i in report.instructions if i.kind == "shared_load"}
    assert cost == {4: 1, 8: 2, 16: 4}


@both
def test_ldmatrix_bank_conflicts(emulator: Emulator) -> None:
    def conflicts(kernel: str) -> float:
        a, b = (torch.randn(32, 32).half() for _ in "ab")
        arguments = {"a": a, "b": b, "c": Output(torch.zeros(32, 32))}
        return emulator.launch(kernel, arguments, grid=1, block=32).ldmatrix_conflicts

    assert conflicts("matrix_product/fp16") == 1
    # Rows of 64 bytes: rows 0, 2, 4 and 6 share their banks.
    assert conflicts("matrix_product/unswizzled") == 4


@checked
def test_copies_that_nobody_reads(emulator: Emulator) -> None:
    def unread(kernel: str) -> dict[int, int]:
        a, b = (torch.randn(32, 32).half() for _ in "ab")
        arguments = {"a": a, "b": b, "c": Output(torch.zeros(32, 32))}
        report = emulator.launch(kernel, arguments, grid=1, block=32)
        report.raise_findings()
        return {place.line: count for place, count in report.unread_copies.items()}

    assert unread("matrix_product/fp16") == {}
    # Rows 8-15 and 24-31 of a, four copies each.
    assert unread("matrix_product/wrong_row") == {line_of("cp_async<16>(at(tiles[0]"): 16 * 4}


@checked
def test_bytes_and_widths(emulator: Emulator) -> None:
    report = copy(emulator, "copy/fp32")
    x, y = report.buffers["x"], report.buffers["y"]
    assert x.bytes_read == x.unique_bytes_read == 403 * 4
    assert y.bytes_written == y.unique_bytes_written == 403 * 4
    assert (x.bytes_written, y.bytes_read) == (0, 0)
    assert (x.reads["16"], x.reads["4"]) == (100, 3)
    assert (y.writes["16"], y.writes["4"]) == (100, 3)
    assert sum(x.reads.values()) == 103


@checked
def test_block_copies_are_counted(emulator: Emulator) -> None:
    x, y = random(4, 128), np.zeros((4, 128), np.float32)
    arguments = {"x": x, "y": Output(y), "count": 128}
    report = emulator.launch("copy_block", arguments, grid=1, block=4)
    report.raise_findings()
    assert np.array_equal(x, y)
    assert report.buffers["x"].bytes_read == report.buffers["y"].bytes_written == x.nbytes


@checked
def test_repeated_bytes_are_counted_once_as_unique(emulator: Emulator) -> None:
    arguments = {"y": random(64), "count": 33}
    y = emulator.launch("add_neighbour", arguments, grid=2, block=32).buffers["y"]
    assert (y.bytes_read, y.unique_bytes_read) == (2 * 32 * 4, 33 * 4)
    assert (y.bytes_written, y.unique_bytes_written) == (32 * 4, 32 * 4)


# ---- The driver ----------------------------------------------------------------------------------


@both
def test_buffers_outlive_a_launch(emulator: Emulator) -> None:
    x = random(403)
    with Buffer(x, name="x") as first, Buffer(x, name="y", initialised=False) as second:
        for source, target in ((first, second), (second, first)):
            arguments = {"x": source, "y": target, "count": 403}
            emulator.launch("copy/fp32", arguments, grid=1, block=32).raise_findings()
        assert np.array_equal(first.read(), x)
        assert np.array_equal(second.read(), x)


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "nothing"}, "no kernel"),
        ({"grid": 0}, "grid"),
        ({"grid": (1, 70000)}, "grid"),
        ({"block": 1025}, "block"),
        ({"shared_bytes": 228 << 10}, "shared memory"),
        ({"arguments": {"y": None}}, "parameters"),
        ({"arguments": {"y": None, "count": "4"}}, "number"),
        ({"arguments": {"y": np.zeros((4, 4))[:, 1], "count": 4}}, "contiguous"),
    ],
)
def test_refused_launch(emulator: Emulator, change: dict[str, object], message: str) -> None:
    launch = {
        "kernel": "add_neighbour",
        "arguments": {"y": np.zeros(4, np.float32), "count": 4},
        "grid": 1,
        "block": 32,
    } | change
    with pytest.raises(ValueError, match=message):
        emulator.launch(**launch)


def test_build_errors_show_the_compiler_output(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    with pytest.raises(BuildError, match="error: expected unqualified-id"):
        build_kernels([source], checked=False)


def test_libraries_are_rebuilt_when_a_header_changes(tmp_path: Path) -> None:
    header, source = tmp_path / "value.h", tmp_path / "kernel.cpp"
    source.write_text(
        '#include "register.h"\n#include "emulator.h"\n#include "value.h"\n'
        "__global__ void set(int* y) { y[threadIdx.x] = VALUE; }\n"
        'EMULATOR_KERNEL("set", set);\n'
    )
    libraries = []
    for value in (1, 2, 1):
        header.write_text(f"#define VALUE {value}\n")
        libraries.append(build_kernels([source], checked=False))
    assert libraries[0] == libraries[2] != libraries[1]
