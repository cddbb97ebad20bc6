"""The implicit GEMM of csrc/cuda, executed on the emulator, against float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.certify_cuda import LAYERS
from fused_resnet.backends.cuda import bundled, gathers, round_to_tf32
from fused_resnet.backends.cuda_schedule import TILES, ConvSchedule, candidates, choose
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests import cuda_emulated as emulated
from tests.emulator import SCHEDULES

ARITHMETICS = tuple(emulated.DTYPES)


#: Geometries that no tile, slice or vector divides: N, C, H, W, K, (R, S), stride, padding,
#: dilation, groups.
ODD = {
    "ragged": (2, 40, 9, 11, 72, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one_pixel": (1, 16, 1, 1, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one_output_channel": (1, 64, 5, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "odd_output_channels": (1, 24, 6, 5, 67, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "even_kernel": (1, 16, 8, 9, 24, (2, 4), (1, 1), (1, 2), (1, 1), 1),
    "stride_3x2": (1, 16, 17, 13, 24, (3, 3), (3, 2), (1, 1), (1, 1), 1),
    "wide_padding": (1, 16, 3, 4, 16, (3, 3), (1, 1), (4, 3), (1, 1), 1),
    "kernel_over_image": (1, 16, 3, 3, 16, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "dilation": (1, 32, 13, 12, 40, (3, 3), (1, 1), (2, 3), (2, 3), 1),
    "dilation_stride": (2, 16, 15, 14, 16, (3, 2), (2, 2), (3, 1), (3, 2), 1),
    "groups": (1, 128, 7, 6, 256, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "resnext": (1, 128, 6, 6, 128, (3, 3), (2, 2), (1, 1), (1, 1), 32),
    "depthwise": (1, 48, 7, 7, 48, (3, 3), (1, 1), (1, 1), (1, 1), 48),
    "odd_groups": (1, 15, 6, 6, 21, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "three_channels": (2, 3, 19, 17, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "one_channel": (1, 1, 9, 9, 10, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "odd_channels": (1, 37, 6, 7, 33, (3, 3), (1, 1), (1, 1), (2, 1), 1),
    "even_channels": (2, 18, 6, 7, 33, (3, 3), (1, 2), (1, 1), (2, 1), 1),
    "even_groups": (1, 36, 5, 6, 20, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "kernel_33": (1, 8, 2, 40, 8, (1, 33), (1, 1), (0, 2), (1, 1), 1),
    "kernel_16x15": (1, 5, 17, 16, 8, (16, 15), (1, 1), (3, 2), (1, 1), 1),
    "kernel_17": (1, 3, 19, 4, 8, (17, 2), (1, 1), (2, 1), (1, 1), 1),
}


def problem_of(geometry: tuple, arithmetic: str, epilogue: str) -> ConvProblem:
    n, c, h, w, k, (r, s), stride, padding, dilation, groups = geometry
    dtype = emulated.DTYPES[arithmetic]
    return ConvProblem(n, c, h, w, k, r, s, stride, padding, dilation, groups, epilogue, dtype)


def layer(index: int, arithmetic: str, epilogue: str, size: int) -> ConvProblem:
    """A layer of a ResNet on at most ``size`` x ``size`` pixels."""
    c, k, h, r, stride = LAYERS[index]
    h = min(h, size)
    geometry = (1, c, h, h, k, (r, r), (stride,) * 2, (r // 2,) * 2, (1, 1), 1)
    return problem_of(geometry, arithmetic, epilogue)


def inputs(problem: ConvProblem, seed: int = 0) -> tuple:
    p, generator = problem, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fan_in = p.c // p.groups * p.r * p.s
    return (
        draw(p.n, p.c, p.h, p.w).to(p.dtype),
        (draw(p.k, p.c // p.groups, p.r, p.s) / math.sqrt(fan_in)).to(p.dtype),
        draw(p.k) + 1,
        draw(p.k),
        draw(*p.out_shape).to(p.dtype) if p.has_residual else None,
    )


def assert_right(result: Tensor, problem: ConvProblem, arithmetic: str, args: tuple) -> None:
    """The rule: at most twice stock torch's error; stock tf32 sees operands rounded to tf32."""
    reference = reference_conv(problem, *args)
    x, weight, *rest = args
    if arithmetic == "tf32":
        x, weight = round_to_tf32(x), round_to_tf32(weight)
    allowed = error(stock_conv(problem, x, weight, *rest), reference)
    found = error(result, reference)
    assert found.within(allowed, problem.dtype), f"{problem}: {found}, stock {allowed}"


def check(problem: ConvProblem, arithmetic: str, schedule: ConvSchedule, run: emulated.Run) -> None:
    args = inputs(problem)
    result = emulated.conv(run, problem, arithmetic, schedule, *args)
    assert run.findings == []
    assert_right(result, problem, arithmetic, args)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_every_tile_and_epilogue(arithmetic: str, tile, epilogue: str) -> None:
    problem = problem_of(ODD["ragged"], arithmetic, epilogue)
    turn = EPILOGUES.index(epilogue) + tile.index
    for splits in (1, 3):
        run = emulated.Run(schedule=SCHEDULES[(turn + splits) % 3], seed=turn)
        check(problem, arithmetic, ConvSchedule(tile, splits), run)


@pytest.mark.parametrize("index", range(len(LAYERS)))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_layers_of_resnets(arithmetic: str, index: int) -> None:
    """Each layer with the schedule that it would get on an A100 at some batch size."""
    problem = layer(index, arithmetic, EPILOGUES[index % 5], 9)
    if arithmetic == "float32":
        # Without tensor cores to emulate at a stroke, fewer channels do.
        problem = dataclasses.replace(problem, c=problem.c // 4, k=problem.k // 4)
    schedule = choose(dataclasses.replace(problem, n=(1, 8, 64)[index % 3]), 108)
    check(problem, arithmetic, schedule, emulated.Run(schedule=SCHEDULES[index % 3], seed=index))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(LAYERS)))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_layers_of_resnets_full_size(arithmetic: str, index: int) -> None:
    for tile, epilogue in zip(TILES, EPILOGUES, strict=False):
        problem = layer(index, arithmetic, epilogue, 224)
        for schedule in SCHEDULES:
            run = emulated.Run(schedule=schedule, seed=index)
            check(problem, arithmetic, ConvSchedule(tile), run)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_odd_geometries(arithmetic: str, name: str) -> None:
    turn = list(ODD).index(name)
    problem = problem_of(ODD[name], arithmetic, EPILOGUES[turn % 5])
    tiles = [s.tile for s in candidates(bundled(problem), gathers(problem)) if s.splits == 1]
    for splits in (1, 2):
        run = emulated.Run(schedule=SCHEDULES[(turn + splits) % 3], placement="left", seed=turn)
        check(problem, arithmetic, ConvSchedule(tiles[turn % len(tiles)], splits), run)


def test_odd_geometries_take_both_ways_in() -> None:
    gathered = {name for name in ODD if gathers(problem_of(ODD[name], "float16", "none"))}
    assert gathered == {
        *("odd_groups", "three_channels", "one_channel", "odd_channels", "even_channels"),
        *("even_groups", "kernel_33", "kernel_16x15", "kernel_17"),
    }


def test_narrow_groups_are_bundled() -> None:
    problem = problem_of(ODD["resnext"], "float16", "none")
    assert bundled(problem).groups == 2


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_nan_and_infinity_arrive(arithmetic: str) -> None:
    problem = problem_of(ODD["ragged"], arithmetic, "relu")
    x, *rest = inputs(problem)
    x[0, 3, 4, 5], x[1, 7, 2, 2] = float("nan"), float("inf")
    result = emulated.conv(emulated.Run(), problem, arithmetic, ConvSchedule(TILES[3]), x, *rest)
    reference = reference_conv(problem, x, *rest)
    assert torch.equal(result.isnan(), reference.isnan())
    assert torch.equal(result.isinf(), reference.isinf())


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_result_does_not_depend_on_order(arithmetic: str) -> None:
    """Splits are added in one order, whatever order blocks and threads ran in."""
    problem = problem_of(ODD["ragged"], arithmetic, "add_relu")
    args = inputs(problem)
    results = [
        emulated.conv(
            emulated.Run(schedule=schedule, seed=1),
            problem,
            arithmetic,
            ConvSchedule(TILES[3], 4),
            *args,
        )
        for schedule in SCHEDULES
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


CHECKED = [
    *(("ragged", tile, splits, True) for tile, splits in zip(TILES, (1, 2, 1, 3), strict=True)),
    ("stride_3x2", TILES[3], 1, True),
    ("dilation", TILES[1], 1, True),
    ("wide_padding", TILES[3], 2, True),
    ("odd_output_channels", TILES[3], 1, True),
    ("groups", TILES[2], 1, True),
    ("three_channels", TILES[1], 1, True),
    ("odd_groups", TILES[3], 2, True),
    ("even_channels", TILES[1], 1, True),
    ("even_groups", TILES[3], 2, True),
    ("kernel_33", TILES[3], 1, True),
]


@pytest.mark.parametrize(("name", "tile", "splits", "residual"), CHECKED)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_checked_build_reports_nothing(
    arithmetic: str, name: str, tile, splits: int, residual: bool
) -> None:
    turn = ARITHMETICS.index(arithmetic) + list(ODD).index(name)
    problem = problem_of(ODD[name], arithmetic, ("relu", "add_relu")[turn % 2])
    run = emulated.Run(
        checked=True,
        schedule=SCHEDULES[turn % 3],
        placement=("right", "left")[turn % 2],
        seed=turn,
    )
    check(problem, arithmetic, ConvSchedule(tile, splits), run)
    kinds = ("ldmatrix", "shared_load", "shared_store", "cp_async")
    for report, kind in itertools.product(run.reports, kinds):
        assert report.conflicts(kind) == 1.0, f"{report.kernel}: {kind}"
    assert [report.unread_copies for report in run.reports if report.unread_copies] == []


def test_access_widths_and_bytes() -> None:
    """Every pixel comes from memory by 16 bytes, and no byte of y is written twice."""
    problem = layer(0, "float16", "add_relu", 14)
    run = emulated.Run(checked=True)
    emulated.conv(run, problem, "float16", ConvSchedule(TILES[1]), *inputs(problem))
    (report,) = run.reports
    y_size = math.prod(problem.out_shape)
    x, weight, *_ = inputs(problem)
    for name, elements in (("x", x.numel()), ("weight", weight.numel()), ("residual", y_size)):
        traffic = report.buffers[name]
        assert set(nonzero(traffic.reads)) == {"16"}
        assert traffic.unique_bytes_read == 2 * elements
    for name in ("scale", "shift"):
        assert set(nonzero(report.buffers[name].reads)) == {"16"}
    y = report.buffers["y"]
    assert set(nonzero(y.writes)) == {"16"}
    assert y.bytes_written == y.unique_bytes_written == 2 * y_size
    assert report.buffers["residual"].bytes_read == y.bytes_written
    assert report.conflicts("shared_store") == 1.0


def nonzero(widths: dict[str, int]) -> dict[str, int]:
    return {width: count for width, count in widths.items() if count}


#: A fault and the kind of finding that must name it. The two others are no defects of memory: what
#: they leave behind has tests of its own.
BUGS = {
    "missing_barrier": "race",
    "loose_wait": "in-flight",
    "dropped_padding": "out-of-bounds",
    "ragged_tile": "out-of-bounds",
    "split_race": "global-race",
}


def run_bug(bug: str) -> tuple[emulated.Run, ConvProblem, tuple, Tensor]:
    problem = problem_of(ODD["ragged"], "float16", "relu")
    args = inputs(problem)
    run = emulated.Run(checked=True)
    schedule = ConvSchedule(TILES[3], 2 if bug == "split_race" else 1)
    result = emulated.conv(run, problem, "float16", schedule, *args, bug=bug)
    return run, problem, args, result


def test_without_a_seeded_bug_nothing_is_reported() -> None:
    run, problem, args, result = run_bug("none")
    assert run.findings == []
    (report,) = run.reports
    assert report.unread_copies == {}
    assert report.conflicts("ldmatrix") == 1.0
    assert_right(result, problem, "float16", args)


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bug_is_reported(bug: str) -> None:
    run, *_ = run_bug(bug)
    kinds = {kind for report in run.reports for kind in report.kinds}
    assert any(kind.startswith(BUGS[bug]) for kind in kinds), run.findings
    places = {place.file for r in run.reports for f in r.findings for place in f.places}
    assert any(file.endswith(".cuh") for file in places)


def test_wrong_fragment_row_leaves_copies_unread() -> None:
    """Of 16 rows of A, 8 to 15 are copied and not read: these pixels are wrong and no others."""
    run, problem, args, result = run_bug("fragment_row")
    (report,) = run.reports
    ((place, count),) = report.unread_copies.items()
    source = Path(emulated.__file__).parents[1] / "csrc" / "cuda" / place.file
    assert "cp_async" in source.read_text().splitlines()[place.line - 1]
    # Taps inside of the image, for each output pixel; 40 channels are 5 copies of 16 bytes, for
    # each of two tiles of channels.
    image = torch.ones(problem.n, 1, problem.h, problem.w)
    taps = torch.conv2d(image, torch.ones(1, 1, 3, 3), padding=1).flatten()
    unread = torch.arange(len(taps)) % 16 >= 8
    assert count == int(taps[unread].sum()) * 5 * 2
    right = reference_conv(problem, *args)
    wrong = (emulated.nhwc(result - right).flatten(0, 2).abs() > 0.1).any(1)
    assert torch.equal(wrong, unread)


def test_missing_swizzle_collides() -> None:
    """The result is right; eight rows of a matrix meet in four banks."""
    run, problem, args, result = run_bug("unswizzled")
    assert_right(result, problem, "float16", args)
    (report,) = run.reports
    assert report.conflicts("ldmatrix") == 8.0
    assert report.ldmatrix_conflicts == 8.0
    assert report.unread_copies == {}
    matrices = [i for i in report.instructions if i.kind == "ldmatrix"]
    assert all(i.cost == 8 * i.ideal and i.place.file.endswith(".cuh") for i in matrices)
