"""Remembered calls: found again while nothing has changed, and never after anything has."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import _build, backend, backends, recall, refresh
from fused_resnet.functional import conv_bn_act

pytestmark = pytest.mark.skipif(
    _build.extension is None, reason="guards need the compiled extension"
)


def _modules() -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    return conv.eval(), bn.eval(), nn.ReLU(inplace=True)


def _image() -> Tensor:
    return torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)


def _was_recalled(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | None = None, *rest: object
) -> bool:
    residual, act_before_add = (*rest, None, False)[:2] if rest else (None, False)
    return recall.recall(x, conv, bn, act, residual, bool(act_before_add)) is not None  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_second_call_is_recalled_and_gives_the_same() -> None:
    conv, bn, relu = _modules()
    x = _image()
    assert not _was_recalled(x, conv, bn, relu)
    first = conv_bn_act(x, conv, bn, relu)
    assert _was_recalled(x, conv, bn, relu)
    assert torch.equal(conv_bn_act(x, conv, bn, relu), first)
    other = _image()
    torch.testing.assert_close(conv_bn_act(other, conv, bn, relu), relu(bn(conv(other))))


@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("with_act", [True, False])
@pytest.mark.parametrize("add", ["none", "after", "before"])
def test_every_epilogue_is_recalled(with_bn: bool, with_act: bool, add: str) -> None:
    conv, some_bn, relu = _modules()
    bn, act = (some_bn if with_bn else None), (relu if with_act else None)
    x = _image()
    residual = None if add == "none" else torch.randn(2, 8, 9, 7)
    calls = [conv_bn_act(x, conv, bn, act, residual, act_before_add=add == "before")]
    assert _was_recalled(x, conv, bn, act, residual, add == "before")
    calls.append(conv_bn_act(x, conv, bn, act, residual, act_before_add=add == "before"))
    z = conv(x) if bn is None else bn(conv(x))
    if act is not None and add == "before":
        z = torch.relu(z)
    z = z if residual is None else z + residual
    for y in calls:
        torch.testing.assert_close(y, z if act is None else torch.relu(z))


def _hook(module: nn.Module, *args: object) -> None:
    return None


_EDITS: dict[str, Callable[[nn.Conv2d, nn.BatchNorm2d, nn.ReLU], object]] = {
    "weight in place": lambda conv, bn, act: conv.weight.mul_(2.0),
    "weight's data replaced": lambda conv, bn, act: setattr(
        conv.weight, "data", conv.weight.data * 2.0
    ),
    "weight replaced": lambda conv, bn, act: setattr(
        conv, "weight", nn.Parameter(conv.weight * 2.0)
    ),
    "bias in place": lambda conv, bn, act: conv.bias.add_(1.0),  # type: ignore[union-attr]
    "gamma in place": lambda conv, bn, act: bn.weight.mul_(2.0),
    "beta in place": lambda conv, bn, act: bn.bias.add_(1.0),
    "running mean in place": lambda conv, bn, act: bn.running_mean.add_(1.0),  # type: ignore[union-attr]
    "running variance replaced": lambda conv, bn, act: setattr(
        bn,
        "running_var",
        bn.running_var * 4.0,  # type: ignore[operator]
    ),
    "eps": lambda conv, bn, act: setattr(bn, "eps", 0.5),
    "a step of training": lambda conv, bn, act: (
        bn.train(),
        bn(torch.randn(4, 8, 3, 3) + 3.0),
        bn.eval(),
    ),
    "load_state_dict": lambda conv, bn, act: bn.load_state_dict(
        {name: value + 1 for name, value in bn.state_dict().items()}
    ),
    "stride": lambda conv, bn, act: setattr(conv, "stride", (2, 2)),
    "padding": lambda conv, bn, act: setattr(conv, "padding", (0, 0)),
    "dilation": lambda conv, bn, act: setattr(conv, "dilation", (2, 2)),
    "padding mode": lambda conv, bn, act: setattr(conv, "padding_mode", "circular"),
    "train mode": lambda conv, bn, act: bn.train(),
    "a forward of its own": lambda conv, bn, act: setattr(
        conv, "forward", lambda x: torch.zeros(2, 8, 9, 7)
    ),
    "a hook on the convolution": lambda conv, bn, act: conv.register_forward_hook(
        lambda module, args, y: y + 1.0
    ),
    "a hook before the batch norm": lambda conv, bn, act: bn.register_forward_pre_hook(
        lambda module, args: (args[0] * 2.0,)
    ),
    "a hook on the activation": lambda conv, bn, act: act.register_forward_hook(
        lambda module, args, y: y + 1.0
    ),
    "another class": lambda conv, bn, act: setattr(act, "__class__", nn.Tanh),
}


@pytest.mark.parametrize("what", _EDITS)
def test_no_edit_is_missed(what: str) -> None:
    conv, bn, act = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, act)
    assert _was_recalled(x, conv, bn, act)
    _EDITS[what](conv, bn, act)
    assert not _was_recalled(x, conv, bn, act)
    expected = act(bn(conv(x)))
    for _ in range(2):  # Twice: what is remembered after the edit must hold too.
        torch.testing.assert_close(conv_bn_act(x, conv, bn, act), expected)


def test_conversion_and_refresh_are_noticed() -> None:
    conv, bn, relu = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, relu)
    conv.weight.data.mul_(2.0)
    refresh(conv)
    assert not _was_recalled(x, conv, bn, relu)
    conv_bn_act(x, conv, bn, relu)
    conv.bfloat16()
    bn.bfloat16()
    y = conv_bn_act(x.bfloat16(), conv, bn, relu)
    wide = copy.deepcopy((conv, bn))
    reference = torch.relu(wide[1].double()(wide[0].double()(x.bfloat16().double())))
    torch.testing.assert_close(y.double(), reference, rtol=1e-2, atol=1e-2)


def test_inputs_of_another_kind_are_not_recalled() -> None:
    conv, bn, relu = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, relu)
    assert not _was_recalled(x.contiguous(), conv, bn, relu)
    assert not _was_recalled(x[:1], conv, bn, relu)
    assert not _was_recalled(x.double(), conv, bn, relu)
    assert not _was_recalled(x, conv, bn, relu, torch.randn(2, 8, 9, 7))
    assert not _was_recalled(x, conv, bn, None)
    assert not _was_recalled(x, conv, None, relu)
    assert not _was_recalled(nn.Parameter(x), conv, bn, relu)
    with pytest.raises(ValueError, match="channels"):
        conv_bn_act(torch.randn(2, 5, 9, 7), conv, bn, relu)


def test_global_hooks_are_seen() -> None:
    conv, bn, relu = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, relu)
    handle = nn.modules.module.register_module_forward_hook(_hook)
    try:
        assert not _was_recalled(x, conv, bn, relu)
    finally:
        handle.remove()
    assert _was_recalled(x, conv, bn, relu)


def test_nobody_who_watches_is_passed_by() -> None:
    conv, bn, relu = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, relu)
    assert _was_recalled(x, conv, bn, relu)

    with torch.enable_grad():
        assert not _was_recalled(x, conv, bn, relu)
        assert conv_bn_act(x, conv, bn, relu).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert not _was_recalled(x, conv, bn, relu)
        assert conv_bn_act(x, conv, bn, relu).dtype == torch.bfloat16
    with torch.profiler.profile() as profile:
        conv_bn_act(x, conv, bn, relu)
    names = {event.key for event in profile.key_averages()}
    assert "fused_resnet::conv_affine_act" in names

    seen: list[str] = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args=(), kwargs=None
        ):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watcher():
        conv_bn_act(x, conv, bn, relu)
    assert any("conv_affine_act" in name for name in seen)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        assert not _was_recalled(dual, conv, bn, relu)


def test_another_backend_is_obeyed() -> None:
    conv, bn, relu = _modules()
    x = _image()
    conv_bn_act(x, conv, bn, relu)
    with backend("torch"), backends.observe() as choices:
        assert not _was_recalled(x, conv, bn, relu)
        for _ in range(2):
            conv_bn_act(x, conv, bn, relu)
    assert [choice.kernel.backend for choice in choices] == ["torch", "torch"]
    with backends.observe() as choices:
        conv_bn_act(x, conv, bn, relu)
    assert choices[0].kernel.backend != "torch"


def test_inference_mode_has_its_own() -> None:
    conv, bn, relu = _modules()
    x = _image()
    expected = conv_bn_act(x, conv, bn, relu)
    with torch.inference_mode():
        made_inside = x.clone(memory_format=torch.preserve_format)
        for image in (x, made_inside, x, made_inside):
            assert torch.equal(conv_bn_act(image, conv, bn, relu), expected)
        assert _was_recalled(made_inside, conv, bn, relu)


def test_memory_is_bounded_and_freed() -> None:
    conv, bn, relu = _modules()
    for size in range(5, 25):
        conv_bn_act(torch.randn(1, 6, size, size), conv, bn, relu)
    ident = id(conv)
    assert len(recall._remembered[ident].calls) == recall._MAX_CALLS
    del conv
    gc.collect()
    assert ident not in recall._remembered
