"""Which GPUs the Triton backend serves, and what it says of the others: devices are stand-ins."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="this torch comes without Triton")

from fused_resnet import backends, doctor
from fused_resnet.backends import torch_, triton_
from fused_resnet.backends.triton_ import device as device_
from fused_resnet.backends.triton_ import kernels
from fused_resnet.backends.triton_.config import ARCHS, Arch
from fused_resnet.backends.triton_.im2col_kernel import TritonIm2col
from fused_resnet.problem import ConvProblem

GPU = torch.device("cuda", 0)
PROBLEM = ConvProblem(
    32, 128, 28, 28, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", torch.float16
)  # fmt: skip
T4, A100, H100, B200, GB300 = Arch(75, 40), ARCHS[0], ARCHS[3], ARCHS[4], Arch(103, 160)


@pytest.fixture
def gpu(monkeypatch):
    """Makes cuda:0 a GPU of this architecture, and Triton and stock torch the only backends."""

    def pretend(arch, hip=None):
        monkeypatch.setattr(device_, "_cuda_arch", lambda index: arch)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backends, "KERNELS", (*triton_.KERNELS, *torch_.KERNELS))
        monkeypatch.setattr(backends, "NAMES", ("triton", "torch"))
        # Tuned tables ask the driver for the GPU's name.
        monkeypatch.setattr(backends, "_measured", lambda *_: [])

    return pretend


@pytest.mark.parametrize(
    ("arch", "hip", "reason"),
    [
        (T4, None, "Triton makes no tensor-core code for GPUs before sm_80"),
        (A100, "6.4", "the Triton kernels are not verified on ROCm"),
    ],
    ids=["sm_75", "rocm"],
)
def test_what_is_not_served_says_why_and_runs_stock_torch(gpu, arch, hip, reason):
    gpu(arch, hip)
    found = {f.name: f.value for f in doctor._backends(GPU)}
    assert found["triton"].startswith(f"not usable: {reason}")
    choice = backends.choose("conv_affine_act", PROBLEM, GPU)
    assert choice.kernel.backend == "torch"
    assert ("triton/conv", reason) in choice.rejected


@pytest.mark.parametrize("arch", [*ARCHS, GB300], ids=lambda arch: f"sm_{arch.capability}")
def test_what_is_served(gpu, arch):
    gpu(arch)
    (conv, *_) = triton_.KERNELS
    assert conv.supports(PROBLEM, GPU) is None
    assert conv.promising(PROBLEM, GPU)


@pytest.mark.parametrize("arch", [*ARCHS, GB300], ids=lambda arch: f"sm_{arch.capability}")
def test_what_never_ran_is_for_the_tuner_alone(gpu, arch):
    gpu(arch)
    variants = kernels.TritonConv().variants(PROBLEM, GPU)
    offered = [kernel for kernel in variants if isinstance(kernel, TritonIm2col)]
    assert len(offered) == (arch.family in ("wgmma", "tcgen05"))
    assert all("never executed" in kernel.full_name for kernel in offered)
    # The untuned choice does not know it; a table that a tuner wrote finds it by its name.
    candidates = backends.candidates("conv_affine_act", PROBLEM, GPU)
    assert not any(isinstance(kernel, TritonIm2col) for kernel in candidates)
    for kernel in offered:
        assert backends.named("conv_affine_act", kernel.full_name, PROBLEM, GPU) is kernel
        assert not kernel.promising(PROBLEM, GPU)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"groups": 2}, "ungrouped"),
        ({"dilation": (2, 2)}, "undilated"),
        ({"stride": (2, 1)}, "one stride"),
        ({"c": 96}, "multiple of 64"),
        ({"k": 64}, "64 and 128"),
        ({"r": 17, "padding": (8, 8)}, "larger than 16"),
    ],
)
def test_what_im2col_refuses(gpu, change, reason):
    gpu(H100)
    kernel = TritonIm2col()
    assert kernel.supports(PROBLEM, GPU) is None
    assert reason in kernel.supports(dataclasses.replace(PROBLEM, **change), GPU)
    gpu(A100)
    assert "sm_90 and sm_100" in kernel.supports(PROBLEM, GPU)
