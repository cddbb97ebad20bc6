"""Folding of batch norm into (scale, shift), and freshness of what is cached from it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen

import fused_resnet
from fused_resnet import fold
from fused_resnet.functional import conv_bn_act, why_stock
from fused_resnet.numerics import error
from tests.helpers import assert_within_rule

RELU = nn.ReLU()


class FrozenBatchNorm2d(nn.Module):
    """Shaped as detectron2's class of this name: four buffers and eps, no parameters."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
        )


def randomize(bn: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, low, high in (
            ("weight", -2.0, 2.0),
            ("bias", -1.0, 1.0),
            ("running_mean", -1.0, 1.0),
            ("running_var", 0.2, 3.0),
        ):
            t = getattr(bn, name)
            if t is not None:
                t.uniform_(low, high)
    return bn


def pair(c: int = 4, k: int = 6, bias: bool = True) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, bn = nn.Conv2d(c, k, 3, padding=1, bias=bias).eval(), nn.BatchNorm2d(k).eval()
    randomize(bn)
    return conv, bn


def exact(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None) -> Tensor:
    """relu(bn(conv(x))) by the formula, in float64, from the modules' present tensors."""
    z = nn.functional.conv2d(
        x.double(), conv.weight.double(), None, conv.stride, conv.padding, conv.dilation,
        conv.groups,
    )  # fmt: skip
    if conv.bias is not None:
        z = z + conv.bias.double().view(-1, 1, 1)
    if bn is not None:
        z = (z - bn.running_mean.double().view(-1, 1, 1)) / (
            bn.running_var.double().view(-1, 1, 1) + bn.eps
        ).sqrt()
        if bn.weight is not None:
            z = z * bn.weight.double().view(-1, 1, 1)
        if bn.bias is not None:
            z = z + bn.bias.double().view(-1, 1, 1)
    return z.relu()


def assert_fresh(conv: nn.Conv2d, bn: nn.Module | None, x: Tensor | None = None) -> None:
    """The fused result is that of the tensors as they are now."""
    dtype = conv.weight.dtype
    x = torch.randn(2, conv.in_channels, 8, 8).to(dtype) if x is None else x
    assert why_stock(conv, bn) is None
    with torch.no_grad():
        actual = conv_bn_act(x, conv, bn, RELU)
        stock = RELU(conv(x) if bn is None else bn(conv(x)))
        assert_within_rule(actual, exact(x, conv, bn), stock, dtype)


def assert_close_to_stock(conv: nn.Conv2d, bn: nn.Module, x: Tensor) -> None:
    """Far from what any other parameters would give; for loops over many random modules."""
    with torch.no_grad():
        wanted = RELU(bn(conv(x)))
        torch.testing.assert_close(conv_bn_act(x, conv, bn, RELU), wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(6),
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=None),
        lambda: nn.SyncBatchNorm(6),
        lambda: nn.SyncBatchNorm(6, affine=False),
        lambda: TorchvisionFrozen(6),
        lambda: TorchvisionFrozen(6, eps=0.0),
        lambda: FrozenBatchNorm2d(6),
        lambda: None,
    ],
    ids=[
        "batch_norm", "not_affine", "eps_1e-3", "sync", "sync_not_affine", "torchvision_frozen",
        "torchvision_frozen_eps_0", "detectron_frozen", "none",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_norm(norm: Callable[[], nn.Module | None], bias: bool, dtype: torch.dtype) -> None:
    conv, bn = nn.Conv2d(4, 6, 3, padding=1, bias=bias).eval().to(dtype), norm()
    if bn is not None:
        randomize(bn).eval().to(dtype)
    scale, shift = fold.affine_of(conv, bn)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    assert scale.dtype == shift.dtype == vectors
    assert not (isinstance(bn, nn.SyncBatchNorm) and bn.training)
    if isinstance(bn, nn.SyncBatchNorm):  # Its own forward wants a process group, or CUDA.
        plain = nn.BatchNorm2d(6, affine=bn.affine).eval().to(dtype)
        plain.load_state_dict(bn.state_dict())
        x = torch.randn(2, 4, 8, 8).to(dtype)
        with torch.no_grad():
            actual, stock = conv_bn_act(x, conv, bn, RELU), RELU(plain(conv(x)))
            assert_within_rule(actual, exact(x, conv, bn), stock, dtype)
    else:
        assert_fresh(conv, bn)


def test_norm_in_fp32_behind_a_half_precision_convolution() -> None:
    conv, bn = pair()
    conv.bfloat16()
    assert_fresh(conv, bn)


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-3])
@pytest.mark.parametrize("frozen", [False, True])
def test_torture(eps: float, frozen: bool) -> None:
    # Statistics as real checkpoints have them: dead channels and huge ones, in one layer.
    variances = [1e-15, 1e-12, 1e-8, 1e-5, 1e-3, 1.0, 1e3, 1e5] + ([0.0] if eps else [1e-30])
    k = len(variances) * 3
    bn = (TorchvisionFrozen if frozen else nn.BatchNorm2d)(k, eps=eps).eval()
    conv = nn.Conv2d(8, k, 3, padding=1, bias=False).eval()
    with torch.no_grad():
        bn.running_var.copy_(torch.tensor(variances).repeat(3))
        bn.weight.copy_(torch.tensor([0.7, -1.3, 0.0]).repeat_interleave(len(variances)))
        bn.bias.uniform_(-1, 1)
        # Where variance is tiny so is the activation, in a checkpoint that was trained.
        sigma = (bn.running_var + eps).sqrt()
        conv.weight.mul_(sigma.view(-1, 1, 1, 1))
        bn.running_mean.copy_(torch.randn(k) * sigma)
    scale, shift = fold.affine_of(conv, bn)
    wanted = bn.weight.double() / (bn.running_var.double() + eps).sqrt()
    assert torch.equal(scale, wanted.float())
    assert torch.equal(shift, (bn.bias.double() - bn.running_mean.double() * wanted).float())
    assert bool(scale.isfinite().all())
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        actual, stock, reference = conv_bn_act(x, conv, bn, RELU), RELU(bn(conv(x))), exact(
            x, conv, bn
        )  # fmt: skip
    # Channel by channel, so that large ones hide nothing.
    for i in range(k):
        found = error(actual[:, i], reference[:, i])
        assert found.within(error(stock[:, i], reference[:, i]), torch.float32), (i, found)


def test_gradients_reach_bias_gamma_and_beta() -> None:
    conv, bn = pair()
    conv.double(), bn.double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tensors = [conv.weight, conv.bias, bn.weight, bn.bias]
    for _ in range(2):  # the second time from the cache
        mine = torch.autograd.grad(conv_bn_act(x, conv, bn, RELU).square().sum(), tensors)
        theirs = torch.autograd.grad(RELU(bn(conv(x))).square().sum(), tensors)
        for m, t in zip(mine, theirs, strict=True):
            torch.testing.assert_close(m, t, rtol=1e-9, atol=1e-9)


def test_double_backward_through_the_cache() -> None:
    conv, bn = pair()
    conv.double(), bn.double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)

    def second(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(f(x).square().sum(), [bn.weight], create_graph=True)
        return torch.autograd.grad(g.square().sum(), [bn.weight, bn.bias, conv.bias, conv.weight])

    for m, t in zip(
        second(lambda v: conv_bn_act(v, conv, bn, None)), second(lambda v: bn(conv(v))), strict=True
    ):
        torch.testing.assert_close(m, t, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.BatchNorm2d(6, track_running_stats=False), "keeps no running statistics"),
        (lambda: nn.GroupNorm(2, 6), "GroupNorm is not a batch norm"),
        (lambda: nn.InstanceNorm2d(6), "InstanceNorm2d is not a batch norm"),
        (lambda: type("Mine", (nn.BatchNorm2d,), {"forward": lambda s, x: x * 2})(6), "overrides"),
        (lambda: nn.Identity(), "Identity is not a batch norm"),
    ],
    ids=["no_statistics", "group_norm", "instance_norm", "own_forward", "identity"],
)
def test_other_norms_run_as_they_are(norm: Callable[[], nn.Module], reason: str) -> None:
    conv, bn, x = nn.Conv2d(4, 6, 3).eval(), norm().eval(), torch.randn(2, 4, 7, 7)
    assert reason in why_stock(conv, bn)
    assert torch.equal(conv_bn_act(x, conv, bn, RELU), RELU(bn(conv(x))))


class WeightStandardized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def patched(module: nn.Module) -> nn.Module:
    original = module.forward
    module.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda conv, bn: (WeightStandardized(4, 6, 3), bn),
        lambda conv, bn: (patched(conv), bn),
        lambda conv, bn: (conv, patched(bn)),
        lambda conv, bn: (parametrizations.spectral_norm(conv), bn),
        lambda conv, bn: (parametrizations.weight_norm(conv), bn),
        lambda conv, bn: (nn.utils.weight_norm(conv), bn),
    ],
    ids=["conv_forward", "patched_conv", "patched_bn", "spectral", "weight", "old_weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modules_with_a_will_of_their_own_run_as_they_are(
    change: Callable[..., tuple[nn.Conv2d, nn.Module]],
) -> None:
    conv, bn = pair()
    conv, bn = change(conv, bn)
    conv.eval(), bn.eval()
    x = torch.randn(1, 4, 7, 7)
    assert why_stock(conv, bn) is not None
    assert torch.equal(conv_bn_act(x, conv, bn, RELU), RELU(bn(conv(x))))


# ------------------------------------------------------------------------------------- freshness


def other_state(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv2, bn2 = pair(bias=conv.bias is not None)
    conv.load_state_dict(conv2.state_dict())
    bn.load_state_dict(bn2.state_dict())


def assigned_state(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv2, bn2 = pair()
    conv.load_state_dict(conv2.state_dict(), assign=True)
    bn.load_state_dict(bn2.state_dict(), assign=True)


@torch.no_grad()
def edited(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    for t in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var):
        t.mul_(1.5).abs_().add_(0.1)


@torch.no_grad()
def edited_through_views(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv.weight[0, 0].fill_(1.0)
    bn.weight.view(2, 3)[1] = 4.0
    bn.running_var.detach()[2] = 9.0


@torch.no_grad()
def copied_foreach(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    torch._foreach_mul_([conv.weight, conv.bias, bn.weight, bn.running_mean], 1.5)


def replaced_parameters(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    conv.bias = None
    bn.weight = nn.Parameter(torch.randn_like(bn.weight))
    bn.running_var = torch.rand_like(bn.running_var) + 0.5


def replaced_data(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    for t in (conv.weight, conv.bias, bn.weight, bn.bias):
        t.data = torch.randn_like(t)


def replaced_data_at_the_same_address(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    # Memory that was given back may be given out again: another tensor, at a known address.
    tensors = (conv.weight, conv.bias, bn.weight, bn.bias)
    memory = [bytearray(t.numel() * 4) for t in tensors]
    for _ in range(2):
        for t, buffer in zip(tensors, memory, strict=True):
            data = torch.frombuffer(buffer, dtype=torch.float32).view(t.shape)
            t.data = data.copy_(torch.randn(t.shape))
            del data
        conv_bn_act(torch.randn(2, 4, 8, 8), conv, bn, RELU)


def swapped_data(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    bn.weight.data, bn.bias.data = bn.bias.data, bn.weight.data


def trained(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    bn.train()
    conv_bn_act(torch.randn(4, 4, 8, 8) * 3 + 1, conv, bn, RELU)
    bn.eval()


def stepped(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[..., None]:
    def step(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        o = optimizer([*conv.parameters(), *bn.parameters()])
        conv_bn_act(torch.randn(2, 4, 8, 8), conv, bn, RELU).square().sum().backward()
        o.step()

    return step


def changed_eps(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    bn.eps = 0.7


def round_trip(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv.bfloat16(), bn.bfloat16()
    conv.float(), bn.float()


def reset(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    conv.reset_parameters()
    bn.reset_parameters()


def edited_data_and_refreshed(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    for t in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var):
        t.data.mul_(1.5).abs_()
    fused_resnet.refresh(conv)
    fused_resnet.refresh(bn)


EDITS: dict[str, Callable[[nn.Conv2d, nn.BatchNorm2d], object]] = {
    "load_state_dict": other_state,
    "load_state_dict_assign": assigned_state,
    "in_place": edited,
    "through_views": edited_through_views,
    "foreach": copied_foreach,
    "replaced_parameters": replaced_parameters,
    "replaced_data": replaced_data,
    "replaced_data_same_address": replaced_data_at_the_same_address,
    "swapped_data": swapped_data,
    "train_mode_forward": trained,
    "sgd": stepped(lambda p: torch.optim.SGD(p, lr=0.5)),
    "sgd_foreach": stepped(lambda p: torch.optim.SGD(p, lr=0.5, foreach=True)),
    "sgd_fused": stepped(lambda p: torch.optim.SGD(p, lr=0.5, fused=True)),
    "adam_fused": stepped(lambda p: torch.optim.Adam(p, lr=0.5, fused=True)),
    "eps": changed_eps,
    "half": lambda conv, bn: (conv.half(), bn.half()),
    "bfloat16": lambda conv, bn: (conv.bfloat16(), bn.bfloat16()),
    "double": lambda conv, bn: (conv.double(), bn.double()),
    "round_trip": round_trip,
    "channels_last": lambda conv, bn: conv.to(memory_format=torch.channels_last),
    "reset_parameters": reset,
    "data_in_place_then_refresh": edited_data_and_refreshed,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("edit", EDITS)
def test_fresh_after(edit: str, grad: bool) -> None:
    # Several rounds, since the allocator must happen to give out an old address again.
    conv, bn = pair()
    for _ in range(6 if "data" in edit or edit == "round_trip" else 2):
        with torch.set_grad_enabled(grad):
            conv_bn_act(torch.randn(2, 4, 8, 8).to(conv.weight.dtype), conv, bn, RELU)
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.randn(6))
        EDITS[edit](conv, bn)
        assert_fresh(conv, bn)


def test_the_cache_is_used() -> None:
    conv, bn = pair()
    first = fold.affine_of(conv, bn)
    with torch.no_grad():
        second, third = fold.affine_of(conv, bn), fold.affine_of(conv, bn)
    assert second[0] is third[0]
    assert first[0].data_ptr() == second[0].data_ptr()
    assert first[0].requires_grad
    assert not second[0].requires_grad


def test_train_and_eval_toggle() -> None:
    conv, bn = pair()
    mine, theirs = (conv, bn), copy.deepcopy((conv, bn))
    for _ in range(3):
        for training in (False, True):
            x = torch.randn(3, 4, 8, 8) + 1
            for module in (*mine, *theirs):
                module.train(training)
            actual = conv_bn_act(x, *mine, RELU)
            wanted = RELU(theirs[1](theirs[0](x)))
            torch.testing.assert_close(actual, wanted)
            assert torch.equal(mine[1].running_mean, theirs[1].running_mean)
            assert torch.equal(mine[1].running_var, theirs[1].running_var)
            assert torch.equal(mine[1].num_batches_tracked, theirs[1].num_batches_tracked)


def test_one_norm_behind_two_convolutions_and_one_convolution_before_many() -> None:
    conv, bn = pair()
    conv2 = pair()[0]
    norms = [randomize(nn.BatchNorm2d(6).eval()) for _ in range(12)]
    for _ in range(2):
        for c in (conv, conv2):
            assert_fresh(c, bn)
            assert_fresh(c, None)
            for other in norms:
                assert_fresh(c, other)
    edited(conv, bn)
    for c in (conv, conv2):
        assert_fresh(c, bn)


def test_functional_call_with_other_tensors() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = pair()

        def forward(self, x: Tensor, fused: bool = True) -> Tensor:
            if fused:
                return conv_bn_act(x, self.conv, self.bn, RELU)
            return RELU(self.bn(self.conv(x)))

    block, x = Block().eval(), torch.randn(2, 4, 8, 8)
    for _ in range(3):
        torch.testing.assert_close(block(x), block(x, False), rtol=1e-5, atol=1e-5)
        state = {n: torch.rand_like(t) + 0.5 for n, t in block.state_dict().items()
                 if t.is_floating_point()}  # fmt: skip
        calls = [torch.func.functional_call(block, state, (x, fused)) for fused in (True, False)]
        torch.testing.assert_close(*calls, rtol=1e-5, atol=1e-5)


def test_modules_made_in_inference_mode() -> None:
    with torch.inference_mode():
        conv, bn = pair()
        x = torch.randn(2, 4, 8, 8)
        for _ in range(3):
            actual, stock = conv_bn_act(x, conv, bn, RELU), RELU(bn(conv(x)))
            assert_within_rule(actual, exact(x, conv, bn), stock, torch.float32)
            conv.weight.mul_(2)
            bn.weight.mul_(-1)
            bn.running_var.add_(1)
    with torch.no_grad():
        conv_bn_act(x, conv, bn, RELU)


def test_vectors_cached_in_inference_mode_serve_autograd() -> None:
    conv, bn = pair()
    x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        conv_bn_act(x, conv, bn, RELU)
    x.requires_grad_()
    for t in (*conv.parameters(), *bn.parameters()):
        t.requires_grad_(False)
    conv_bn_act(x, conv, bn, RELU).sum().backward()
    assert x.grad is not None


# ------------------------------------------------------------------ copies, pickles and lifetimes


def test_state_dict_copies_and_pickles_carry_no_cache() -> None:
    model = nn.Sequential(*pair())
    keys, attributes = list(model.state_dict()), [set(vars(m)) for m in model]
    size = len(pickle.dumps(model))
    conv, bn = model
    assert_fresh(conv, bn)
    assert list(model.state_dict()) == keys
    assert [set(vars(m)) for m in model] == attributes
    assert len(pickle.dumps(model)) == size
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for clone in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert_fresh(*clone)
        edited(*clone)
        assert_fresh(*clone)
        assert_fresh(conv, bn)


def test_modules_that_are_gone_leave_nothing() -> None:
    gc.collect()
    before = len(fold._cache)
    conv, bn = pair()
    assert_fresh(conv, bn)
    scale = weakref.ref(fold.affine_of(conv, bn)[0].untyped_storage())
    refs = [weakref.ref(t) for t in (conv, bn, conv.weight, bn.weight, bn.running_var)]
    assert len(fold._cache) == before + 1
    del conv, bn
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)
    assert scale() is None
    assert len(fold._cache) == before


def test_a_norm_that_is_gone_is_not_kept_by_its_convolution() -> None:
    conv, bn = pair()
    assert_fresh(conv, bn)
    refs = [weakref.ref(t) for t in (bn, bn.weight, bn.running_var)]
    del bn
    gc.collect()
    assert [r() for r in refs] == [None] * 3


def test_ids_used_again_find_nothing_stale() -> None:
    x = torch.randn(2, 4, 8, 8)
    conv, _ = pair()
    seen: set[int] = set()
    again = 0
    for _ in range(60):
        bn = randomize(nn.BatchNorm2d(6).eval())
        again += id(bn) in seen
        seen.add(id(bn))
        assert_close_to_stock(conv, bn, x)
        del bn
    assert again > 10
    for _ in range(60):
        assert_close_to_stock(*pair(), x)


def test_many_norms_behind_one_convolution_are_bounded() -> None:
    conv, _ = pair()
    norms = [randomize(nn.BatchNorm2d(6).eval()) for _ in range(30)]
    for bn in norms:
        fold.affine_of(conv, bn)
    assert len(fold._cache[conv]) <= fold._MAX_NORMS


def test_threads_and_edits() -> None:
    # Readers hold a lock with the writer around each call, as a server that swaps weights would;
    # among themselves they run freely.
    conv, bn = pair()
    x = torch.randn(1, 4, 8, 8)
    lock, failures, done = threading.Lock(), [], threading.Event()

    def write() -> None:
        for i in range(40):
            with lock, torch.no_grad():
                conv.weight.mul_(-1)
                bn.weight.add_(0.01 * i)
        done.set()

    def read() -> None:
        with torch.inference_mode():
            while not done.is_set():
                with lock:
                    actual, wanted = conv_bn_act(x, conv, bn, RELU), RELU(bn(conv(x)))
                if not torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4):
                    failures.append((actual - wanted).abs().max())

    threads = [threading.Thread(target=f) for f in (read, read, read, write)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_threads_without_edits() -> None:
    conv, bn = pair()
    xs = [torch.randn(1, 4, 5 + i % 7, 6) for i in range(14)]
    with torch.no_grad():
        wanted = [RELU(bn(conv(x))) for x in xs]
    failures: list[object] = []

    def read() -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    for x, w in zip(xs, wanted, strict=True):
                        torch.testing.assert_close(conv_bn_act(x, conv, bn, RELU), w)
        except Exception as e:  # a thread's exception would be lost
            failures.append(e)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
