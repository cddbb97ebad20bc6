"""Choice among backends: override, refusals, failures, verification, and packed weights."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, freshness, ops
from fused_resnet.backends import FusedResNetWarning, kernel, library, torch_
from fused_resnet.backends.verify import verify
from fused_resnet.problem import EPILOGUES, ConvProblem, MaxPool
from tests.helpers import (
    CPU,
    Args,
    assert_within_rule,
    call,
    conv_kernels,
    conv_problem,
    draw,
    reference,
    stock,
)

P = conv_problem()


def ran(p: ConvProblem = P) -> str:
    """Name of the kernel behind one call of the op; the result is checked, too."""
    args = draw(p)
    with backends.observe() as choices:
        actual = call(p, args)
    assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)
    (choice,) = choices
    assert isinstance(choice.problem, ConvProblem)
    assert choice.problem == p
    assert choice.device == CPU
    return choice.kernel.full_name


class Fake(backends.Kernel):
    """A kernel that does as it is told."""

    backend, op, name = "library", "conv_affine_act", "fake"

    def __init__(self, behave: Callable[[ConvProblem, Args], Tensor]) -> None:
        self.behave = behave
        self.calls = 0

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        return None

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        self.calls += 1
        return self.behave(problem, Args(*args))


def right(p: ConvProblem, args: Args) -> Tensor:
    return stock(p, args)


@pytest.fixture
def install(
    fresh_registry: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[backends.Kernel], Any]:
    """Put a kernel before all others."""

    def put(first: backends.Kernel) -> Any:
        monkeypatch.setattr(backends, "KERNELS", (first, *backends.KERNELS))
        return first

    return put


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusedResNetWarning)
        yield


# -------------------------------------------------------------------------------------- override


def test_names() -> None:
    assert backends.NAMES[-1] == "torch"
    assert "library" in backends.NAMES
    assert len({(k.op, k.full_name) for k in backends.KERNELS}) == len(backends.KERNELS)


@pytest.mark.usefixtures("no_warnings")
def test_context_forces_and_nests() -> None:
    unforced = ran()
    assert unforced.startswith(("library/", "cpu/"))
    with fused_resnet.backend("torch"):
        assert ran() == "torch/aten"
        with fused_resnet.backend("library"):
            assert ran().startswith("library/")
            with fused_resnet.backend("torch", "library"):
                assert ran() == "torch/aten"
        assert ran() == "torch/aten"
    assert ran() == unforced


def test_context_is_left_after_an_exception() -> None:
    with pytest.raises(KeyError), fused_resnet.backend("torch"):
        raise KeyError
    assert backends.forced() is None


@pytest.mark.parametrize("names", [("tensorrt",), ("torch", "Library"), ()])
def test_unknown_names(names: tuple[str, ...]) -> None:
    with (
        pytest.raises(ValueError, match=r"unknown backend|name at least one"),
        fused_resnet.backend(*names),
    ):
        pass
    assert backends.forced() is None


def test_override_holds_for_one_thread_only() -> None:
    seen: list[object] = []
    with fused_resnet.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
    assert seen == [None]


SCRIPT = """
import torch, fused_resnet
from fused_resnet import backends, functional
with backends.observe() as seen:
    functional.conv_affine_act(torch.randn(2, 8, 32, 32), torch.randn(8, 8, 3, 3),
                               torch.ones(8), torch.zeros(8))
print(seen[0].kernel.backend)
"""


@pytest.mark.parametrize(
    ("value", "output", "message"),
    [
        (" torch, library", "torch", ""),
        ("nonsense", None, "FUSED_RESNET_BACKEND='nonsense': unknown backend 'nonsense'"),
    ],
)
def test_environment_variable(value: str, output: str | None, message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, backends.ENV: value, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if message:
        assert result.returncode != 0
        assert message in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert output is None or result.stdout.strip() == output


@pytest.mark.usefixtures("fresh_registry")
def test_forced_but_unsupported_runs_stock_and_says_why_once() -> None:
    p = replace(P, dtype=torch.float16)
    with fused_resnet.backend("library"), pytest.warns(FusedResNetWarning) as record:
        # Another shape for the same reason is no news.
        names = [ran(q) for q in (p, replace(p, n=3), replace(p, h=11))]
    assert names == ["torch/aten"] * 3
    (warning,) = record
    text = str(warning.message)
    assert "backend library was forced but cannot compute conv 3x3 8->12" in text
    assert "only float32 and bfloat16 are offered, not torch.float16" in text
    assert "torch/aten runs instead" in text


@pytest.mark.usefixtures("fresh_registry")
def test_forced_backend_without_a_kernel_for_the_op() -> None:
    names = {k.backend for k in backends.KERNELS if k.op == "conv_affine_relu_maxpool"}
    missing = [n for n in backends.NAMES if n not in names]
    if not missing:
        pytest.skip("every backend has a kernel for every op")
    p = conv_problem(1, 3, 12, 12, 4, 7, None, (2, 2), (3, 3), pool=MaxPool((3, 3), (2, 2), (1, 1)))
    with (
        fused_resnet.backend(missing[0]),
        pytest.warns(FusedResNetWarning, match="it has no kernel for conv_affine_relu_maxpool"),
    ):
        assert ran(p) == "torch/aten"


@pytest.mark.usefixtures("fresh_registry")
def test_order_of_forced_backends_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Fake):
        backend = "cpu"

        def promising(self, problem: Any, device: torch.device) -> bool:
            return False

    monkeypatch.setattr(backends, "KERNELS", (Slow(right), *backends.KERNELS))
    with fused_resnet.backend("cpu", "library"):
        assert ran(replace(P, n=5)) == "cpu/fake"
    assert ran(replace(P, n=5)) != "cpu/fake"


@pytest.mark.usefixtures("no_warnings")
def test_onednn_switched_off_and_on_between_calls() -> None:
    p = replace(P, n=2, c=32, k=32, h=20, w=20)
    assert ran(p) == "library/onednn"
    with torch.backends.mkldnn.flags(enabled=False):
        assert ran(p) != "library/onednn"
    assert ran(p) == "library/onednn"


def test_refusals_are_kept_with_their_reasons() -> None:
    p = replace(P, dtype=torch.float64)
    choice = backends.choose("conv_affine_act", p, CPU)
    assert choice.kernel.full_name == "torch/aten"
    reasons = dict(choice.rejected)
    assert set(reasons) >= {"library/onednn", "library/aten_folded", "library/cudnn_relu"}
    assert "float64" in reasons["library/onednn"]
    assert "GPU" in reasons["library/cudnn_relu"]


@pytest.mark.usefixtures("no_warnings")
def test_observers_nest_and_end() -> None:
    with backends.observe() as outer:
        ran()
        with backends.observe() as inner:
            ran()
    ran()
    assert (len(outer), len(inner)) == (2, 1)


def test_remembered_choices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_MAX_REMEMBERED", 8)
    weight, vector = torch.randn(2, 2, 1, 1), torch.ones(2)
    for n in range(1, 40):
        fused_resnet.functional.conv_affine_act(torch.randn(n, 2, 3, 3), weight, vector, vector)
        fused_resnet.functional.add_relu(torch.randn(n), torch.randn(n))
        assert len(ops._remembered) <= 8


# -------------------------------------------------------------------------- failures, verification


def test_a_kernel_that_raises_is_replaced(install: Callable[..., Any]) -> None:
    broken = {"now": False}

    def behave(p: ConvProblem, args: Args) -> Tensor:
        if broken["now"]:
            raise RuntimeError("no such instruction")
        return right(p, args)

    fake = install(Fake(behave))
    assert ran() == "library/fake"
    broken["now"] = True
    calls = fake.calls
    with pytest.warns(FusedResNetWarning) as record:
        names = [ran(p) for p in (P, P, replace(P, n=7))]
    assert "library/fake" not in names
    assert fake.calls == calls + 1
    (warning,) = record
    assert "library/fake is no longer used on cpu in torch.float32" in str(warning.message)
    assert "it raised RuntimeError: no such instruction" in str(warning.message)
    # Its verdict is for this dtype; in another one it is asked again, and refused by verification.
    with pytest.warns(FusedResNetWarning, match="on conv .* it raised RuntimeError"):
        assert ran(replace(P, dtype=torch.bfloat16)) != "library/fake"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, a: right(p, a) * 1.001, "its error is"),
        (lambda p, a: right(replace(p, epilogue="none"), a), "its error is"),
        (lambda p, a: right(p, a).double(), "it returned"),
        (lambda p, a: right(p, a)[:, :, :1], "it returned"),
        (lambda p, a: torch.full_like(right(p, a), float("nan")), "non-finite"),
        (lambda p, a: right(p, a).nan_to_num(0.0), "with NaN and infinities in its input"),
    ],
    ids=["off_by_a_little", "no_epilogue", "dtype", "shape", "nan", "swallows_nan"],
)
def test_a_wrong_kernel_is_never_used(
    wrong: Callable[..., Tensor], message: str, install: Callable[..., Any]
) -> None:
    fake = install(Fake(wrong))
    with pytest.warns(FusedResNetWarning, match=r"library/fake is not used on cpu") as record:
        assert ran() != "library/fake"
    calls = fake.calls
    assert ran() != "library/fake"
    assert fake.calls == calls
    assert len(record) == 1
    assert message in str(record[0].message)


def test_one_wrong_element_is_enough(install: Callable[..., Any]) -> None:
    def behave(p: ConvProblem, args: Args) -> Tensor:
        y = right(p, args)
        y[-1, -1, -1, -1] += 0.01 * y.abs().max()
        return y

    install(Fake(behave))
    with pytest.warns(FusedResNetWarning, match="library/fake is not used"):
        assert ran() != "library/fake"


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("name", ["library", "torch"])
def test_verification_is_blind_to_the_users_settings(name: str) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            for k in backends.KERNELS:
                if k.backend == name:
                    for dtype in (torch.float32, torch.bfloat16):
                        assert verify(k, CPU, dtype) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("none left"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "python", "cpu_allocator"],
)
@pytest.mark.usefixtures("no_warnings")
def test_out_of_memory_passes_through(error: Exception, install: Callable[..., Any]) -> None:
    full = {"memory": False}

    def behave(p: ConvProblem, args: Args) -> Tensor:
        if full["memory"]:
            raise error
        return right(p, args)

    install(Fake(behave))
    assert ran() == "library/fake"
    full["memory"] = True
    with pytest.raises(type(error), match=str(error)[:10]):
        ran()
    full["memory"] = False
    assert ran() == "library/fake"


def test_an_operand_that_may_be_half_written_is_not_used_again(
    install: Callable[..., Any],
) -> None:
    class Half(Fake):
        op = "add_relu"

        def run(self, problem: Any, *args: Any) -> Tensor:
            a, b = args
            if self.calls >= 0:
                if problem.inplace:
                    a.view(-1)[0] = 99.0
                raise RuntimeError("stopped half-way")
            return (a.add_(b) if problem.inplace else a + b).relu()

    half = install(Half(right))
    half.calls = -1
    a, b = torch.zeros(4), torch.ones(4)
    with fused_resnet.backend("library"):
        fused_resnet.functional.add_relu(a, b)
    half.calls = 0
    with (
        fused_resnet.backend("library"),
        pytest.warns(FusedResNetWarning, match="library/fake is no longer used"),
        pytest.raises(RuntimeError, match="half-way"),
    ):
        fused_resnet.functional.add_relu(a, b, inplace=True)
    assert torch.equal(fused_resnet.functional.add_relu(b, b, inplace=True), torch.full((4,), 2.0))


def test_stock_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Tensor:
        raise RuntimeError("stock failed")

    monkeypatch.setattr(torch_.AtenConv, "run", run)
    with fused_resnet.backend("torch"), pytest.raises(RuntimeError, match="stock failed"):
        ran()


# ---------------------------------------------------------------------------------- packed weights


class Counting(backends.PackedKernel):
    """Packs by copying, and counts."""

    backend, op, name = "library", "conv_affine_act", "counting"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        return None

    def pack_key(self, problem: ConvProblem) -> int:
        return problem.h

    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        self.count += 1
        return weight.detach().clone(), scale.detach().clone(), shift.detach().clone()

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        x, weight, scale, shift, residual = args
        return stock(problem, Args(x, *self.packed(problem, weight, scale, shift), residual))


def persistent_args(p: ConvProblem = P) -> Args:
    args = draw(p)
    return args._replace(
        weight=nn.Parameter(args.weight),
        scale=freshness.keep(args.scale),
        shift=freshness.keep(args.shift),
    )


@torch.no_grad()
def set_weight(args: Args) -> Args:
    args.weight.mul_(-1)
    return args


@torch.no_grad()
def set_scale(args: Args) -> Args:
    args.scale.add_(1)
    return args


@torch.no_grad()
def set_shift_through_a_view(args: Args) -> Args:
    args.shift[2:].view(-1)[0] = 50.0
    return args


def replace_data(args: Args) -> Args:
    args.weight.data = torch.empty(0)
    args.weight.data = torch.randn(12, 8, 3, 3)
    return args


PACKED_EDITS: dict[str, Callable[[Args], Args]] = {
    "weight": set_weight,
    "scale": set_scale,
    "shift_view": set_shift_through_a_view,
    "data": replace_data,
    "other_weight": lambda a: a._replace(weight=nn.Parameter(torch.randn_like(a.weight))),
    "other_scale": lambda a: a._replace(scale=torch.randn_like(a.scale)),
    "other_shift": lambda a: a._replace(shift=freshness.keep(torch.randn_like(a.shift))),
}


@pytest.mark.parametrize("edit", PACKED_EDITS)
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "plain"])
@pytest.mark.parametrize("k", conv_kernels(), ids=lambda k: k.full_name)
def test_packed_weights_are_fresh(k: backends.Kernel, persistent: bool, edit: str) -> None:
    args = persistent_args() if persistent else draw(P)
    for _ in range(5):
        with torch.no_grad():
            k.run(P, *args)
            args = PACKED_EDITS[edit](args)
            assert_within_rule(k.run(P, *args), reference(P, args), stock(P, args), P.dtype)


def test_persistent_weights_are_packed_once() -> None:
    k, args = Counting(), persistent_args()
    for _ in range(3):
        k.run(P, *args)
    assert k.count == 1
    # Aliases of the kept vectors, as autograd makes them, are known too.
    k.run(P, *args._replace(scale=args.scale.detach(), shift=args.shift.view(-1)))
    assert k.count == 1
    # So are intermediate results with the same contents.
    plain = args._replace(scale=args.scale + 0)
    for _ in range(3):
        k.run(P, *plain._replace(scale=plain.scale.clone()))
    assert k.count == 2


def test_a_weight_at_the_address_of_another_that_is_gone() -> None:
    k, args, memory = Counting(), persistent_args(), bytearray(12 * 8 * 9 * 4)
    for value in (1.0, 2.0):
        data = torch.frombuffer(memory, dtype=torch.float32).view(12, 8, 3, 3)
        args.weight.data = data.fill_(value)
        del data
        assert torch.equal(k.packed(P, *args[1:4])[0], args.weight)
    assert k.count == 2


def test_what_was_packed_shares_no_memory_with_a_temporary() -> None:
    class Aliasing(Counting):
        def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
            self.count += 1
            return weight, scale.detach(), shift.detach()

    k, args = Aliasing(), persistent_args()
    shift = args.shift.clone()
    k.run(P, *args._replace(shift=shift))
    again = shift.clone()
    shift.data.fill_(99.0)  # compiled code writes its next result here, unseen by version counters
    actual = k.run(P, *args._replace(shift=again))
    assert k.count == 1
    assert_within_rule(actual, reference(P, args), stock(P, args), P.dtype)


def test_plain_weights_are_packed_at_every_call() -> None:
    k, args = Counting(), draw(P)
    for _ in range(2):
        k.run(P, *args)
    args.weight.data.mul_(2)
    assert_within_rule(k.run(P, *args), reference(P, args), stock(P, args), P.dtype)
    assert k.count == 3
    assert not k._entries


def test_layouts_of_one_weight_are_bounded() -> None:
    k = Counting()
    weight, scale, shift = persistent_args()[1:4]
    for h in range(3, 30):
        p = replace(P, h=h)
        args = draw(p)._replace(weight=weight, scale=scale, shift=shift)
        assert_within_rule(k.run(p, *args), reference(p, args), stock(p, args), p.dtype)
        (entry,) = k._entries.values()
        assert len(entry.packed) <= kernel._MAX_LAYOUTS
    assert k.count == 27
    k.run(p, *args)
    assert k.count == 27


def test_packed_weights_die_with_the_weight() -> None:
    k, args = Counting(), persistent_args()
    k.run(P, *args)
    refs = [weakref.ref(t) for t in (args.weight, args.scale, *k.packed(P, *args[1:4]))]
    del args
    gc.collect()
    assert not k._entries
    assert [r() for r in refs] == [None] * len(refs)


def test_ids_used_again_find_no_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a new weight gets the id of a dead one is up to the allocator: here all ids are equal.
    monkeypatch.setattr(kernel, "id", lambda _: 7, raising=False)
    k, base = Counting(), persistent_args()

    def args_of(value: float) -> Args:
        return base._replace(weight=nn.Parameter(torch.full((12, 8, 3, 3), value)))

    for i in range(5):
        args = args_of(float(i))
        assert torch.equal(k.packed(P, *args[1:4])[0], args.weight)
        del args
    assert k.count == 5
    assert not k._entries

    first, second = args_of(1.0), args_of(2.0)
    for args in (first, second, first, second):
        assert torch.equal(k.packed(P, *args[1:4])[0], args.weight)
    del first, args
    assert torch.equal(k.packed(P, *second[1:4])[0], second.weight)
    assert k.count == 9  # the end of the first has not taken the second's entry along
    del second
    assert not k._entries


def test_inference_tensors_are_never_remembered() -> None:
    k = Counting()
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(12, 8, 3, 3), requires_grad=False)
        args = draw(P)._replace(weight=weight)
        for i in range(3):
            weight.mul_(2)
            k.run(P, *args)
            assert k.count == i + 1


def test_nothing_is_remembered_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is computed during capture has no values until the replay, and other ones after the next.
    k, args = Counting(), persistent_args()
    monkeypatch.setattr(kernel, "capturing", lambda device: True)
    k.run(P, *args)
    assert not k._entries
    monkeypatch.undo()
    k.run(P, *args)
    assert len(k._entries) == 1


def test_threads_share_packed_weights() -> None:
    k, failures = Counting(), []
    problems = [replace(P, h=h) for h in range(3, 12)]
    weight, scale, shift = persistent_args()[1:4]
    jobs = [(p, draw(p)._replace(weight=weight, scale=scale, shift=shift)) for p in problems]
    wanted = [stock(p, a) for p, a in jobs]

    def work() -> None:
        try:
            for _ in range(30):
                for (p, args), w in zip(jobs, wanted, strict=True):
                    assert torch.equal(k.run(p, *args), w)
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


# ------------------------------------------------------------------------------------------- cuDNN


def cudnn_problem(**changes: Any) -> ConvProblem:
    return conv_problem(
        **{"r": 3, "s": 2, "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "c": 8,
           "k": 12, "groups": 2, **changes}
    )  # fmt: skip


@pytest.mark.parametrize("epilogue", ["relu", "add_relu"])
def test_arguments_of_cudnn(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins with the signatures of the ATen functions, which need a GPU. Their argument names
    # are compared with torch's, so that a signature that changes is noticed.
    def conv_relu(x, weight, bias, stride, padding, dilation, groups):
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        y = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (y + alpha * z).relu()

    for function, name in (
        (conv_relu, "cudnn_convolution_relu"),
        (conv_add_relu, "cudnn_convolution_add_relu"),
    ):
        schema = getattr(torch.ops.aten, name).default._schema
        code = function.__code__
        taken = ["self" if n == "x" else n for n in code.co_varnames]
        assert [a.name for a in schema.arguments] == taken[: code.co_argcount]
        monkeypatch.setattr(torch, name, function)
    p = cudnn_problem(epilogue=epilogue)
    args = draw(p)
    for _ in range(2):
        actual = library.CudnnConv().run(p, *args)
        assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)


def test_what_cudnn_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    k, cuda = library.CudnnConv(), torch.device("cuda")
    monkeypatch.setattr(torch._C, "_has_cudnn", True)
    monkeypatch.setattr(torch.version, "hip", None)
    for epilogue in EPILOGUES:
        p = cudnn_problem(epilogue=epilogue)
        assert (k.supports(p, cuda) is None) == (epilogue in ("relu", "add_relu"))
    assert "fold" in k.supports(cudnn_problem(dtype=torch.bfloat16), cuda)
    assert "not on cpu" in k.supports(cudnn_problem(), CPU)
    with torch.backends.cudnn.flags(enabled=False):
        assert "switched off" in k.supports(cudnn_problem(), cuda)
    monkeypatch.setattr(torch._C, "_has_cudnn", False)
    assert "not available" in k.supports(cudnn_problem(), cuda)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("epilogue", ["relu", "add_relu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_cudnn_on_a_gpu(epilogue: str, groups: int) -> None:
    cuda = torch.device("cuda")
    p = cudnn_problem(epilogue=epilogue, groups=groups)
    args = Args(*(None if t is None else t.to(cuda) for t in draw(p)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert backends.verdict(library.CudnnConv(), cuda, torch.float32) is None
        actual = library.CudnnConv().run(p, *args)
        assert_within_rule(actual, reference(p, args), stock(p, args), p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    "kernel_", [k for k in library.KERNELS if k.op == "conv_affine_act"], ids=str
)
def test_nan_and_infinity_pass_as_in_torch(kernel_, epilogue: str, dtype: torch.dtype) -> None:
    p = ConvProblem(2, 8, 9, 9, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, epilogue, dtype)
    if kernel_.supports(p, CPU) is not None:
        pytest.skip(f"not supported: {kernel_.supports(p, CPU)}")
    x = torch.randn(2, 8, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 4, 4], x[1, 1, 2, 2] = float("nan"), float("inf")
    r = torch.randn(2, 16, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    args = (
        x,
        torch.randn(16, 8, 3, 3).to(dtype),
        torch.rand(16) + 0.5,
        torch.randn(16),
        r if "add" in epilogue else None,
    )
    found, expected = kernel_.run(p, *args), torch_.AtenConv().run(p, *args)
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf())


@pytest.mark.parametrize(
    "shape",
    [
        {"n": 1, "c": 512, "h": 3, "w": 3, "k": 512},
        {"n": 1, "c": 256, "h": 4, "w": 4, "k": 512, "stride": (2, 2)},
        {"n": 2, "c": 960, "h": 2, "w": 2, "k": 160, "r": 1, "padding": (0, 0)},
        {"n": 2, "c": 576, "h": 1, "w": 1, "k": 144, "r": 1, "padding": (0, 0)},
        {"n": 2, "c": 2048, "h": 7, "w": 7, "k": 128, "r": 1, "padding": (0, 0)},
        {"n": 15, "c": 512, "h": 7, "w": 7, "k": 64, "r": 1, "padding": (0, 0)},
    ],
    ids=["512x3x3", "256x3x3/2", "960x1x1", "576x1x1", "2048x1x1", "15_images"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_long_sums_are_as_exact_as_stock(shape: dict[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    for seed in range(3):
        p = conv_problem(**shape)
        args = draw(p, seed)
        args = args._replace(x=args.x.relu())
        assert_within_rule(call(p, args), reference(p, args), stock(p, args), p.dtype)
