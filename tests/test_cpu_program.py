"""Native programs against float64: chains, schedules, memory, threads, processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_resnet._build import extension
from fused_resnet.backends import cpu_program
from fused_resnet.backends.cpu import native_conv, native_stem
from fused_resnet.backends.cpu_program import (
    AddRelu,
    Conv,
    Convert,
    CpuProgram,
    GlobalAveragePool,
    Linear,
    Place,
    Step,
    count_leading,
    lay_out,
    reads,
)
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import MaxPool
from tests.helpers import assert_within_rule, channels_last, conv_problem, draw, short
from tests.leaks import left_by, needs_mallinfo

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = () if extension is None else tuple(extension.isa_available())
POOL = MaxPool((3, 3), (2, 2), (1, 1))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass
class Net:
    """A network written down twice: as steps, and as functions of torch tensors of any dtype."""

    dtype: torch.dtype
    values: dict[int, tuple[tuple[int, ...], torch.dtype]]
    steps: list[Step] = field(default_factory=list)
    functions: list[Callable[[dict[int, Tensor]], Tensor]] = field(default_factory=list)

    def _new(self, shape: tuple[int, ...]) -> int:
        value = len(self.values)
        self.values[value] = (shape, self.dtype)
        return value

    def conv(
        self, x: int, k: int, r: int = 3, stride: int = 1, residual: int | None = None,
        pool: MaxPool | None = None, groups: int = 1, kernel: str = "direct",
    ) -> int:  # fmt: skip
        n, c, h, w = self.values[x][0]
        p = conv_problem(
            n, c, h, w, k, r, None, (stride, stride), (r // 2, r // 2), (1, 1), groups,
            "relu" if residual is None else "add_relu", self.dtype, pool=pool,
        )  # fmt: skip
        _x, weight, scale, shift, _r = draw(p, len(self.steps))
        scale = scale.abs() + 0.5
        assert extension is not None
        native = native_conv(kernel, extension.isa(), replace(p, pool=None))
        if pool is not None:
            native, kernel = native_stem(extension.isa(), p), "stem"
        y = self._new(p.out_shape)
        self.steps.append(Conv(x, y, p, kernel, native.pack(weight), scale, shift, residual))

        def function(v: dict[int, Tensor]) -> Tensor:
            r = None if residual is None else v[residual]
            if v[x].dtype == torch.float64:
                return reference_conv(p, v[x], weight, scale, shift, r)
            with torch.backends.mkldnn.flags(enabled=False):
                return stock_conv(p, v[x].to(self.dtype), weight, scale, shift, r)

        self.functions.append(function)
        return y

    def max_pool(self, x: int, pool: MaxPool = POOL) -> int:
        f = lambda v: torch.max_pool2d(v, pool.kernel, pool.stride, pool.padding)  # noqa: E731
        y = self._new(tuple(f(torch.empty(self.values[x][0])).shape))
        self.steps.append(cpu_program.MaxPool(x, y, pool))
        self.functions.append(lambda v: f(v[x]))
        return y

    def mean(self, x: int) -> int:
        y = self._new(self.values[x][0][:2])
        self.steps.append(GlobalAveragePool(x, y))
        self.functions.append(lambda v: v[x].mean((2, 3)))
        return y

    def linear(self, x: int, k: int) -> int:
        n, c = self.values[x][0]
        weight = (torch.randn(k, c) / c**0.5).to(self.dtype)
        bias = torch.randn(k).to(self.dtype)
        y = self._new((n, k))
        self.steps.append(Linear(x, y, weight, bias))
        self.functions.append(
            lambda v: nn.functional.linear(v[x], weight.to(v[x].dtype), bias.to(v[x].dtype))
        )
        return y

    def add_relu(self, x: int, residual: int) -> int:
        y = self._new(self.values[x][0])
        self.steps.append(AddRelu(x, residual, y))
        self.functions.append(lambda v: torch.relu(v[x] + v[residual]))
        return y

    def convert(self, x: int) -> int:
        y = self._new(self.values[x][0])
        self.steps.append(Convert(x, y))
        self.functions.append(
            lambda v: v[x].to(self.dtype).to(v[x].dtype) if v[x].dtype == torch.float64
            else v[x].to(self.dtype)
        )  # fmt: skip
        return y

    def program(self, *outputs: int, inputs: tuple[int, ...] = (0,)) -> CpuProgram:
        return CpuProgram(self.steps, self.values, inputs, outputs)

    def evaluate(self, *inputs: Tensor, float64: bool) -> dict[int, Tensor]:
        values = {i: x.double() if float64 else x for i, x in enumerate(inputs)}
        for step, function in zip(self.steps, self.functions, strict=True):
            values[step.y] = function(values)
        return values

    def check(self, *inputs: Tensor, outputs: tuple[int, ...]) -> None:
        reference = self.evaluate(*inputs, float64=True)
        stock = self.evaluate(*inputs, float64=False)
        results = self.program(*outputs, inputs=tuple(range(len(inputs))))(*inputs)
        for value, result in zip(outputs, results, strict=True):
            assert_within_rule(result, reference[value], stock[value], self.dtype)
            assert result.is_contiguous(
                memory_format=torch.channels_last if result.dim() == 4 else torch.contiguous_format
            )


def resnet(n: int, dtype: torch.dtype, size: int = 40, width: int = 16) -> tuple[Net, int]:
    """Stem, a basic block, a bottleneck with projection, another, mean and classifier."""
    net = Net(dtype, {0: ((n, 3, size, size), torch.float32)})
    x = net.conv(0, width, 7, 2, pool=POOL)
    x = net.conv(net.conv(x, width), width, residual=x)
    for stride in (2, 1):
        y = net.conv(net.conv(x, width, 1), width, 3, stride)
        shortcut = net.conv(x, 4 * width, 1, stride) if stride == 2 else x
        x = net.conv(y, 4 * width, 1, residual=shortcut)
    return net, net.linear(net.mean(x), 10)


@pytest.mark.parametrize("threads_", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_network(
    dtype: torch.dtype, n: int, threads_: int, threads: Callable[[int], None]
) -> None:
    threads(threads_)
    net, logits = resnet(n, dtype)
    net.check(torch.randn(n, 3, 40, 40), outputs=(logits,))


@pytest.mark.parametrize("threads_", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 5])
def test_leading_steps_then_the_whole_batch(
    n: int,
    threads_: int,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads(threads_)
    net, logits = resnet(n, torch.float32)
    cuts = set()
    for cut in range(len(net.steps) + 1):
        monkeypatch.setattr(cpu_program, "count_leading", lambda *_args, cut=cut: cut)
        cuts.add(net.program(logits).leading)
        # Some values in the middle are results too.
        net.check(torch.randn(n, 3, 40, 40), outputs=(logits, 3, 5))
    assert cuts == set(range(len(net.steps) + 1))


@pytest.mark.parametrize("cache", [1 << bits for bits in (10, 15, 16, 17, 18, 24)])
def test_images_of_which_few_fit_the_cache(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven images by one thread: one, some, of which the last are fewer, and all at once.
    assert extension is not None
    monkeypatch.setattr(extension, "cpu_cache_bytes", lambda: cache)
    monkeypatch.setattr(cpu_program, "count_leading", lambda *_args: 3)
    net = Net(torch.float32, {0: ((7, 8, 12, 12), torch.float32)})
    x = net.conv(0, 16)
    x = net.conv(net.conv(x, 16), 16, residual=x)
    net.check(channels_last(torch.randn(7, 8, 12, 12)), outputs=(x,))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float64], ids=short)
def test_images_one_by_one_from_an_input_of_another_dtype(
    source: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_program, "count_leading", lambda *_args: 2)
    torch.set_num_threads(2)
    net = Net(torch.float32, {0: ((5, 3, 9, 10), source)})
    y = net.convert(0)
    z = net.max_pool(y)
    x = torch.randn(5, 3, 9, 10).to(source)
    assert torch.equal(net.program(z)(x)[0], torch.max_pool2d(x.float(), 3, 2, 1))


def test_a_stem_on_a_value_between() -> None:
    net = Net(torch.float32, {0: ((3, 3, 20, 18), torch.float32)})
    y = net.conv(net.convert(0), 16, 7, 2, pool=POOL)
    net.check(torch.randn(3, 3, 20, 18), outputs=(y,))


def test_a_sum_that_threads_share_unevenly() -> None:
    torch.set_num_threads(2)
    net = Net(torch.float32, dict.fromkeys((0, 1), ((1, 5, 3, 7), torch.float32)))
    a, b = (channels_last(torch.randn(1, 5, 3, 7)) for _ in range(2))
    (y,) = net.program(net.add_relu(0, 1), inputs=(0, 1))(a, b)
    assert torch.equal(y, torch.relu(a + b))


def test_threads_have_memory_of_their_own() -> None:
    # Long enough that threads are at work at the same time, often enough to meet a busy machine.
    net, logits = resnet(12, torch.float32, size=96, width=32)
    program = net.program(logits)
    assert program.leading > 0
    x = torch.randn(12, 3, 96, 96)
    alone = program(x)[0].clone()
    torch.set_num_threads(3)
    for _ in range(15):
        torch.testing.assert_close(program(x)[0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_kind_of_step(isa: str, dtype: torch.dtype) -> None:
    assert extension is not None
    before = extension.isa()
    extension.set_isa(isa)
    try:
        net = Net(dtype, {0: ((3, 5, 11, 13), torch.float32), 1: ((3, 7, 11, 13), dtype)})
        x = net.convert(0)
        y = net.conv(x, 7, 3)
        z = net.add_relu(y, 1)
        p = net.max_pool(net.conv(z, 12, groups=1), MaxPool((3, 2), (2, 1), (1, 0)))
        q = net.conv(p, 24, groups=4)
        m = net.mean(q)
        net.check(
            torch.randn(3, 5, 11, 13), torch.randn(3, 7, 11, 13).to(dtype),
            outputs=(net.linear(m, 33), p, z),
        )  # fmt: skip
    finally:
        extension.set_isa(before)


@pytest.mark.parametrize(
    "source", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=short
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_conversion_of_any_strides(dtype: torch.dtype, source: torch.dtype) -> None:
    net = Net(dtype, {0: ((2, 5, 6, 9), source)})
    y = net.convert(0)
    program = net.program(y)
    x = torch.randn(2, 5, 6, 9).to(source)
    every_other = torch.randn(4, 10, 12, 18).to(source)[::2, ::2, ::2, ::2]
    for view in (x, channels_last(x), x.transpose(2, 3).contiguous().transpose(2, 3), every_other):
        (result,) = program(view)
        assert torch.equal(result, view.to(dtype))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_max_pool_hands_nan_on(isa: str, dtype: torch.dtype) -> None:
    assert extension is not None
    before = extension.isa()
    extension.set_isa(isa)
    try:
        net = Net(dtype, {0: ((2, 21, 9, 8), dtype)})
        program = net.program(net.max_pool(0))
        x = channels_last(torch.randn(2, 21, 9, 8).to(dtype))
        x[0, 3, 4, 5] = float("nan")
        x[1, 20, 0, 0] = -float("nan")
        x[1, 2] = -float("inf")
        expected = torch.max_pool2d(x.float(), 3, 2, 1).to(dtype)
        torch.testing.assert_close(program(x)[0], expected, rtol=0, atol=0, equal_nan=True)
    finally:
        extension.set_isa(before)


def test_two_threads_share_a_program() -> None:
    net, logits = resnet(2, torch.float32)
    program = net.program(logits)
    images = [torch.randn(2, 3, 40, 40) for _ in range(2)]
    expected = [program(x)[0] for x in images]
    right = [False, False]

    def work(i: int) -> None:
        right[i] = all(torch.equal(program(images[i])[0], expected[i]) for _ in range(50))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_in_a_forked_child() -> None:
    code = """
import os, torch
from tests.test_cpu_program import resnet
torch.set_num_threads(2)
net, logits = resnet(3, torch.float32)
program = net.program(logits)
x = torch.randn(3, 3, 40, 40)
expected = program(x)[0]
pid = os.fork()
if pid == 0:
    ok = all(torch.equal(program(x)[0], expected) for _ in range(3))
    os._exit(0 if ok else 1)
print(os.waitpid(pid, 0)[1], torch.equal(program(x)[0], expected))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "0 True", done.stderr


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def small_program() -> tuple[CpuProgram, Tensor]:
    """A program whose call is short, and its input."""
    net = Net(torch.float32, {0: ((1, 8, 4, 4), torch.float32)})
    return net.program(net.mean(net.conv(0, 8))), channels_last(torch.randn(1, 8, 4, 4))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
def test_memory_does_not_grow_in_a_million_calls() -> None:
    # Less than two bytes a call: no allocation is that small.
    program, x = small_program()
    for _ in range(1000):
        program(x)
    before = resident_bytes()
    for _ in range(1_000_000):
        program(x)
    assert resident_bytes() - before < 1 << 20


@needs_mallinfo
def test_a_call_leaves_nothing_allocated() -> None:
    program, x = small_program()
    assert left_by(lambda: program(x)) < 8


@needs_mallinfo
def test_a_leak_is_seen() -> None:
    program, x = small_program()
    malloc = ctypes.CDLL(None).malloc
    kept: list[bytes] = []

    def leaks() -> None:
        program(x)
        malloc(48)

    def keeps() -> None:
        program(x)
        kept.append(bytes(64))

    assert left_by(leaks) > 40
    assert left_by(keeps) > 40


def test_the_arena_is_what_the_values_need_at_once() -> None:
    # Of a chain of equal convolutions two values live at any time, whatever its length.
    def arena(length: int) -> int:
        net = Net(torch.float32, {0: ((1, 16, 32, 32), torch.float32)})
        x = 0
        for _ in range(length):
            x = net.conv(x, 16)
        return net.program(x).arena_bytes

    assert arena(9) == arena(3)


def test_a_residual_that_others_read_is_kept() -> None:
    net = Net(torch.float32, {0: ((2, 8, 6, 6), torch.float32)})
    a = net.conv(0, 8)
    b = net.conv(a, 8, residual=a)
    c = net.conv(b, 8, residual=a)
    net.check(channels_last(torch.randn(2, 8, 6, 6)), outputs=(net.add_relu(c, b),))

    sizes = dict.fromkeys(net.values, 8 * 6 * 6 * 4)
    places = lay_out(net.steps, sizes, [0], [net.steps[-1].y], 2, 0).places
    assert places[b] != places[a]  # a is read again
    assert places[c] == places[a]  # for the last time


@pytest.mark.parametrize("threads_", [1, 2, 3])
@pytest.mark.parametrize("kernel", extension.cpu_conv_kernels(LEVELS[-1]) if extension else ())
def test_every_kernel_may_write_on_its_residual(
    kernel: str, threads_: int, threads: Callable[[int], None]
) -> None:
    threads(threads_)
    dtype = torch.bfloat16 if kernel in ("amx", "amx_images") else torch.float32
    shape = (31, 32, 13, 11)
    net = Net(dtype, {0: (shape, dtype)})
    a = net.conv(0, 64)
    y = net.conv(net.conv(a, 64, kernel=kernel), 64, residual=a, kernel=kernel)
    size = 64 * 13 * 11 * dtype.itemsize
    end = net.add_relu(net.conv(y, 64), y)  # y itself is no output
    places = lay_out(net.steps, dict.fromkeys(net.values, size), [0], [end], 31, 0).places
    assert places[y] == places[a]
    x = channels_last(torch.randn(shape).to(dtype))
    (result,) = net.program(end)(x)
    found = error(result, net.evaluate(x, float64=True)[end])
    assert found.finite
    # Beside rounding, the transforms of Winograd's kernels.
    assert found.l2 < (1e-2 if dtype == torch.bfloat16 else 5e-6)


@given(st.data())
def test_nothing_that_is_still_read_is_overwritten(data: st.DataObject) -> None:
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    steps: list[Step] = []
    for y in range(1, integer(2, 12)):
        x, residual = integer(max(0, y - 3), y - 1), integer(max(0, y - 4), y - 1)
        kind = integer(0, 2)
        steps.append(
            AddRelu(x, residual, y) if kind == 0 else _conv(x, y, residual if kind == 1 else None)
        )
    batch, leading = integer(1, 3), integer(0, len(steps))
    sizes = dict.fromkeys(range(len(steps) + 1), 100)
    layout = lay_out(steps, sizes, [0], [steps[-1].y], batch, leading)

    # Each value's memory holds the value until its last reader has run; leading steps all run at
    # once as far as shared memory is concerned.
    holder: dict[tuple[int, int], int] = {}
    for step in steps:
        for value in reads(step):
            place = layout.places[value]
            if place.kind != Place.INPUT:
                assert holder[place.kind, place.where] == value
        place = layout.places[step.y]
        in_place = {layout.places[v] for v in reads(step)} & {place}
        assert not in_place or layout.places[step.x] != place or isinstance(step, AddRelu)
        holder[place.kind, place.where] = step.y
    early = [s.y for s in steps[:leading] if layout.places[s.y].kind == Place.SHARED]
    assert len({layout.places[v].where for v in early}) == len(early)
    for value, place in layout.places.items():
        if place.kind == Place.PRIVATE:
            assert all(i < leading for i, s in enumerate(steps) if value in (*reads(s), s.y))


def _conv(x: int, y: int, residual: int | None) -> Conv:
    nothing = torch.empty(0)
    return Conv(x, y, conv_problem(), "direct", nothing, nothing, nothing, residual)


def test_depth_first_as_far_as_weights_fit_the_cache() -> None:
    steps = [_conv(0, 1, None), _conv(1, 2, None), _conv(2, 3, 1), _conv(3, 4, None)]
    sizes = dict.fromkeys(range(5), 1)
    assert count_leading(steps, sizes, 8, [1, 1, 1, 1], cache=10) == 4
    assert count_leading(steps, sizes, 8, [1, 1, 1, 6], cache=10) == 3
    # Behind the second step two values are handed on, behind the first one only one.
    assert count_leading(steps, sizes, 8, [1, 1, 6, 1], cache=10) == 1
    assert count_leading(steps, sizes, 8, [6, 1, 1, 1], cache=10) == 0
    assert count_leading(steps, sizes, 1, [1, 1, 1, 1], cache=10) == 0


def test_refuses_what_does_not_fit() -> None:
    net = Net(torch.float32, {0: ((1, 8, 6, 6), torch.float32)})
    y = net.conv(0, 8)
    for inputs, outputs, message in (
        ([], [y], "at least one input"),
        ([0], [0], "made by no step"),
        ([0], [7], "made by no step"),
        ([0], [y, y], "named twice"),
        ([0, y], [y], "made twice"),
    ):
        with pytest.raises(ValueError, match=message):
            CpuProgram(net.steps, net.values, inputs, outputs)
    with pytest.raises(ValueError, match="expected y"):
        CpuProgram(net.steps, {**net.values, y: ((1, 9, 6, 6), torch.float32)}, [0], [y])
    step = net.steps[0]
    assert isinstance(step, Conv)
    with pytest.raises(ValueError, match="is named fft"):
        CpuProgram([replace(step, kernel="fft")], net.values, [0], [y])
    program = net.program(y)
    x = channels_last(torch.randn(1, 8, 6, 6))
    for args, raised in (
        ((x, x), ValueError),
        ((x[:, :4],), ValueError),
        ((x.double(),), TypeError),
    ):
        with pytest.raises(raised):
            program(*args)
    assert error(program(x.contiguous())[0], program(x)[0].double()).worst == 0.0


def test_empty_batch() -> None:
    net, logits = resnet(0, torch.float32)
    assert net.program(logits)(torch.randn(0, 3, 40, 40))[0].shape == (0, 10)
