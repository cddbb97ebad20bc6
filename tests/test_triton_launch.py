"""What a call costs on the host: everything that can be done once per problem is done once.

The launch itself is replaced by a recorder, so that no GPU is needed; nothing is timed.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="this torch comes without Triton")

from fused_resnet.backends.triton_ import config, kernels, launch, layout, paths
from fused_resnet.backends.triton_.config import ARCHS
from fused_resnet.problem import AddReluProblem, ConvProblem


class Recorder:
    """Stands in for ``launch.bind``: keeps what was bound and every launch."""

    def __init__(self):
        self.bound, self.launches = [], []

    def __call__(self, launch, device):
        self.bound.append(launch)

        def start(*arguments):
            assert len(arguments) == len(launch.signature)
            self.launches.append((launch, arguments))

        return start


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    for module in (paths, layout, launch):
        monkeypatch.setattr(module, "bind", found)
    layout._pad_start.cache_clear()
    kernels._add_relu_start.cache_clear()
    yield found
    layout._pad_start.cache_clear()
    kernels._add_relu_start.cache_clear()


PROBLEMS = {
    "gemm": ConvProblem(
        32, 64, 14, 14, 256, 1, 1, (1, 1), (0, 0), (1, 1), 1, "add_relu", torch.float16
    ),
    "conv": ConvProblem(
        8, 64, 14, 14, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, "add_relu", torch.float16
    ),
    "split": ConvProblem(
        1, 512, 7, 7, 512, 3, 3, (1, 1), (1, 1), (1, 1), 1, "add_relu", torch.float16
    ),
    "boxes": ConvProblem(
        64, 128, 28, 28, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, "add_relu", torch.float16
    ),
    "rows": ConvProblem(
        2, 3, 32, 32, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "add_relu", torch.float16
    ),
}
LAUNCHES = {"gemm": 1, "conv": 1, "split": 2, "boxes": 1, "rows": 2}


def operands(p):
    x = torch.zeros(p.n, p.c, p.h, p.w, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    # A parameter, since what is not may be a temporary and is packed at every call.
    weight = torch.nn.Parameter(torch.zeros(p.k, p.c, p.r, p.s, dtype=p.dtype))
    residual = torch.zeros(p.out_shape, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.ones(p.k), torch.zeros(p.k), residual


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("arch", [ARCHS[0], ARCHS[3], ARCHS[4]], ids=["sm_80", "sm_90", "sm_100"])
def test_only_the_launch_is_done_at_every_call(name, arch, recorder, monkeypatch):
    problem = PROBLEMS[name]
    kernel = kernels.TritonConv(arch)
    data = operands(problem)
    first = kernel.run(problem, *data)
    assert len(recorder.launches) == LAUNCHES[name]
    if name == "boxes":
        names = {launch.kernel.fn.__name__ for launch in recorder.bound}
        assert ("conv_boxes_kernel" in names) == (arch.family == "tcgen05")
    bound = len(recorder.bound)

    def never(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(kernels, "heuristic", never)
    monkeypatch.setattr(config, "configs", never)
    monkeypatch.setattr(paths, "conv_launches", never)
    monkeypatch.setattr(layout, "pad_launch", never)
    for module in (paths, layout):
        monkeypatch.setattr(module, "tap_weights", never)
        monkeypatch.setattr(module, "row_weights", never)
    # An equal problem that is another object, as every call makes one.
    second = kernel.run(dataclasses.replace(problem), *data)
    assert len(recorder.bound) == bound
    assert len(recorder.launches) == 2 * LAUNCHES[name]
    assert second.data_ptr() != first.data_ptr()


def test_operands_are_passed_as_they_are(recorder):
    problem = PROBLEMS["conv"]
    x, weight, scale, shift, residual = operands(problem)
    y = kernels.TritonConv(ARCHS[0]).run(problem, x, weight, scale, shift, residual)
    ((_, arguments),) = recorder.launches
    pointers = [argument.data_ptr() for argument in arguments if isinstance(argument, torch.Tensor)]
    for tensor in (x, residual, y):
        assert tensor.data_ptr() in pointers


def test_add_relu_binds_once(recorder):
    problem = AddReluProblem((4, 4), torch.float16, True, True)
    a = torch.zeros(4, 4, dtype=torch.float16)
    for _ in range(3):
        assert kernels.TritonAddRelu().run(problem, a, a) is a
    assert len(recorder.bound) == 1
    assert len(recorder.launches) == 3


def test_paths_are_bounded(recorder, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_PATHS", 3)
    kernel = kernels.TritonConv(ARCHS[0])
    for n in range(1, 9):
        problem = dataclasses.replace(PROBLEMS["gemm"], n=n, h=1, w=1)
        kernel.run(problem, *operands(problem))
    assert len(kernel._paths) == 3


def test_a_cpu_tensor_is_refused_outside_the_interpreter():
    reason = kernels.TritonConv().supports(PROBLEMS["conv"], torch.device("cpu"))
    assert reason is None or "TRITON_INTERPRET" in reason
