"""The ways of a fused model to production: compilers, exporters, wrappers, transforms."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.package import PackageExporter, PackageImporter

import fused_resnet
from fused_resnet import FusedResNetWarning, backends, explain, fuse, nodes
from fused_resnet.numerics import error
from fused_resnet.problem import EPILOGUES
from tests.helpers import assert_within_rule, conv_problem, draw, randomise, reference, stock

_BATCH = torch.export.Dim("batch", min=1, max=64)


class Net(nn.Module):
    """Every op of the package: stem, block with a sum, a sum by itself, an op without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        y = self.bn3(self.conv3(x))
        y = F.relu(torch.sigmoid(y) + y)
        return self.fc(y.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    return randomise(Net()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 32, 32)


def assert_right(actual: Tensor, model: nn.Module, *args: Tensor) -> None:
    """Within the rule against float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(a.double() for a in args))
        stock = model(*args)
    found, allowed = error(actual, exact), error(stock, exact)
    assert actual.dtype == stock.dtype
    assert found.within(allowed, stock.dtype), (found, allowed)


def fused_ops(graph: fx.Graph) -> list[str]:
    """The package's ops in a graph, in order."""
    names = [str(n.target) for n in graph.nodes if "fused_resnet" in str(n.target)]
    return [n.removeprefix("fused_resnet.").removesuffix(".default") for n in names]


ALL_OPS = ["conv_affine_relu_maxpool", "conv_affine_act", "conv_affine_act", "add_relu"]

# ----------------------------------------------------------------------------- compilers, exporters


def test_inductor_compiles_one_graph_for_every_batch_size(net: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fuse(net), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3):
            assert_right(compiled(x[:n]), net, x[:n])


def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes={"x": {0: _BATCH}})


def test_export_keeps_the_ops_and_a_dynamic_batch(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    program = export(fuse(net), x)
    assert fused_ops(program.graph) == ALL_OPS
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 3):
        assert_right(loaded(x[:n]), net, x[:n])


def test_decompositions_leave_only_aten(net: nn.Module, x: Tensor) -> None:
    program = export(fuse(net), x).run_decompositions(fused_resnet.decompositions())
    assert fused_ops(program.graph) == []
    assert_right(program.module()(x[:2]), net, x[:2])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decompositions_are_right_in_every_dtype(epilogue: str, dtype: torch.dtype) -> None:
    part = fused_resnet.decompositions()[torch.ops.fused_resnet.conv_affine_act.default]
    p = conv_problem(epilogue=epilogue, dtype=dtype)
    args = draw(p)
    actual = part(*args, p.stride, p.padding, p.dilation, p.groups, p.epilogue)
    assert_within_rule(actual, reference(p, args), stock(p, args), dtype)


_RUN_PACKAGE = """
import sys, torch, fused_resnet
x, wanted = torch.load(sys.argv[2])
model = torch._inductor.aoti_load_package(sys.argv[1])
for n in (1, 3):
    torch.testing.assert_close(model(x[:n]), wanted[:n])
"""


@pytest.mark.slow
def test_aot_inductor_package_runs_in_another_process(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    program = export(fuse(net), x)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2")
    )
    with torch.no_grad():
        torch.save((x, net(x)), tmp_path / "data.pt")
    command = [sys.executable, "-c", _RUN_PACKAGE, package, str(tmp_path / "data.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_onnx_runtime_gives_the_same(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = export(fuse(net), x).run_decompositions(fused_resnet.decompositions())
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    assert {node.domain for node in exported.model.graph} == {""}  # Standard ONNX and nothing else.
    exported.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for n in (1, 3):
        (y,) = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
        assert_right(torch.from_numpy(y), net, x[:n])


def test_fx_traces_a_fused_model_again(net: nn.Module, x: Tensor) -> None:
    traced = fx.symbolic_trace(fuse(net))
    assert sum(n.target in nodes.FUNCTIONS for n in traced.graph.nodes) == 4
    with torch.no_grad():
        assert_right(traced(x), net, x)


def test_jit_trace_records_the_ops(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of much.
        traced = torch.jit.trace(fuse(net), x)
        assert str(traced.inlined_graph).count("fused_resnet::") == 4
        assert_right(traced(x), net, x)


# --------------------------------------------------------------------------------- copies, packages


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "package"])
def test_copies_are_fused_and_independent(
    how: str, net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    fused = fuse(net)
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        with PackageExporter(tmp_path / "net.pt") as exporter:
            exporter.extern(["fused_resnet.**", "tests.**"])
            exporter.save_pickle("net", "net.pkl", fused)
        other = PackageImporter(tmp_path / "net.pt").load_pickle("net", "net.pkl")
    assert explain(other).counts() == explain(fused).counts()
    with torch.no_grad():
        assert_right(other(x), net, x)
        other.conv1.weight.zero_()
        assert_right(fused(x), net, x)


def test_pytorchs_own_fusion_before_and_after(net: nn.Module, x: Tensor) -> None:
    folded = copy.deepcopy(net)
    folded.conv1, folded.bn1 = fuse_conv_bn_eval(folded.conv1, folded.bn1), nn.Identity()
    before = fuse(folded)
    assert explain(before).counts()["conv"] == (3, 3)
    after = fuse(copy.deepcopy(net))
    with torch.no_grad():
        assert_right(after(x), net, x)
    after.conv1, after.bn1 = fuse_conv_bn_eval(after.conv1, after.bn1), nn.Identity()
    with torch.no_grad():
        assert_right(before(x), net, x)
        assert_right(after(x), net, x)


# -------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_autocast(net: nn.Module, x: Tensor, dtype: torch.dtype, grad_mode: Any) -> None:
    fused = fuse(net)
    exact = copy.deepcopy(net).double()(x.double())
    with grad_mode(), torch.autocast("cpu", dtype):
        actual, stock = fused(x), net(x)
        cast = [o.kernel.op for o in _observed(fused, x)]
    assert actual.dtype == stock.dtype
    assert error(actual, exact).within(error(stock, exact), dtype)
    assert len(cast) == 4


def _observed(model: nn.Module, x: Tensor) -> list[backends.Choice]:
    with backends.observe() as choices:
        model(x)
    return choices


def test_inference_mode_and_back(net: nn.Module, x: Tensor) -> None:
    fused = fuse(net)
    with torch.inference_mode():
        assert_right(fused(x).clone(), net, x)
        inside = fuse(net)
        assert_right(inside(x).clone(), net, x)
    # What was cached in inference mode serves autograd.
    for model in (fused, inside):
        y = model(x)
        y.sum().backward()
        assert_right(y.detach(), net, x)


def test_the_profiler_names_the_ops(net: nn.Module, x: Tensor) -> None:
    fused = fuse(net)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fused(x)
    names = [e.name for e in profile.events() if e.name.startswith("fused_resnet::")]
    assert names == [f"fused_resnet::{op}" for op in ALL_OPS]


# ----------------------------------------------------------------------------- torch.func, wrappers


def test_vmap_over_inputs(net: nn.Module, x: Tensor) -> None:
    fused = fuse(net)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # There is a batching rule, so nothing is slow.
        with backends.observe() as choices:
            actual = vmap(fused)(x[:, None])
        assert len(choices) == 4
        assert_right(actual[:, 0], net, x)
        actual = vmap(fused, in_dims=2, out_dims=1)(x[:, :, None])
        assert_right(actual[:, 0], net, x)


def test_vmap_over_an_ensemble(net: nn.Module, x: Tensor) -> None:
    nets = [net, randomise(Net()).eval()]
    parameters, buffers = stack_module_state(nets)
    fused = fuse(net)
    with torch.no_grad():
        both = vmap(lambda p, b: functional_call(fused, (p, b), (x,)))(parameters, buffers)
        for actual, member in zip(both, nets, strict=True):
            assert_right(actual, member, x)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_derivatives(net: nn.Module, x: Tensor, gradients: bool) -> None:
    net, x = net.double(), x.double()
    fused, v = fuse(net), torch.randn_like(x)
    with torch.set_grad_enabled(gradients):
        for actual, wanted in zip(jvp(fused, (x,), (v,)), jvp(net, (x,), (v,)), strict=True):
            torch.testing.assert_close(actual, wanted)
        with forward_ad.dual_level():
            y, w = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, v))) for m in (fused, net))
            torch.testing.assert_close(y.tangent, w.tangent)


def test_gradients_per_sample(net: nn.Module, x: Tensor) -> None:
    net, x = net.double(), x.double()
    parameters = dict(net.named_parameters())

    def loss(model: nn.Module) -> Any:
        return lambda p, image: functional_call(model, p, (image[None],)).square().sum()

    actual, wanted = (
        vmap(grad(loss(m)), in_dims=(None, 0))(parameters, x) for m in (fuse(net), net)
    )
    for name, g in wanted.items():
        torch.testing.assert_close(actual[name], g)


def test_a_global_hook_sees_every_module(net: nn.Module, x: Tensor) -> None:
    fused = fuse(nn.Sequential(net, nn.Sequential(nn.Flatten(), nn.Linear(5, 5))).eval())
    seen: dict[bool, list[str]] = {True: [], False: []}
    for is_fused, model in ((True, fused), (False, fused_resnet.unfuse(fused))):
        handle = torch_module.register_module_forward_hook(
            lambda m, args, out, key=is_fused: seen[key].append(type(m).__name__)
        )
        with torch.no_grad():
            model(x)
        handle.remove()
    assert seen[True] == seen[False]
    assert len(_observed(fused, x)) == 4  # Fused again, once the hook is gone.


def test_a_warning_names_the_users_line(net: nn.Module, x: Tensor, fresh_registry: None) -> None:
    with (
        warnings.catch_warnings(record=True) as caught,
        torch.no_grad(),
        backends.backend("triton"),
    ):
        warnings.simplefilter("always")
        fuse(net)(x)
    ours = [w for w in caught if issubclass(w.category, FusedResNetWarning)]
    assert ours
    assert {w.filename for w in ours} == {__file__}


def test_data_parallel_without_devices(net: nn.Module, x: Tensor) -> None:
    wrapped = nn.DataParallel(fuse(net))
    with torch.no_grad():
        assert_right(wrapped(x), net, x)


def _train_step(rank: int, port: int, state: bytes, x: Tensor, out: Any) -> None:
    """One step of a process: gradients of the fused and of the stock model under DDP."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for training in (True, False):
        grads = []
        for make in (fuse, lambda m: m):
            model = make(pickle.loads(state).train(training))
            ddp = nn.parallel.DistributedDataParallel(model)
            ddp(x[rank::2]).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        right = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*grads, strict=True))
        out.put((rank, training, right, float(grads[0][0].sum())))
    dist.destroy_process_group()


def test_distributed_data_parallel_in_two_processes(net: nn.Module, x: Tensor) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    state, data = pickle.dumps(net.double()), torch.cat([x, x + 1]).double()
    mp.spawn(_train_step, (port, state, data, out), nprocs=2)
    results = [out.get() for _ in range(4)]
    assert all(right for _, _, right, _ in results)
    for training in (True, False):
        first, second = (total for _, t, _, total in results if t is training)
        assert first == second  # The gradients were averaged.
