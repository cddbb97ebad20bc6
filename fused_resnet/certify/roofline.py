"""The least time a problem can take on a device: the larger of its memory and its arithmetic time.

Peaks are the vendor's published dense figures, so every time that comes out is a *prediction* of a
bound, never a measurement. Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model for multicore architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Published peaks of a device: bytes per second, and FLOP/s per kind of arithmetic."""

    name: str
    sm: int
    sms: int
    bandwidth: float
    flops: dict[str, float]
    source: str

    def __hash__(self) -> int:
        return hash(self.name)


#: Arithmetic kinds: ``f16`` is fp16 and bf16 tensor arithmetic with fp32 accumulation.
KINDS = ("f16", "tf32", "fp32")

DEVICES: tuple[Device, ...] = (
    Device(
        "A100",
        80,
        108,
        2.039e12,
        {"f16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        "NVIDIA A100 80GB SXM datasheet",
    ),
    Device(
        "H100",
        90,
        132,
        3.35e12,
        {"f16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
        "NVIDIA H100 SXM5 whitepaper",
    ),
    Device(
        "B200",
        100,
        148,
        8.0e12,
        {"f16": 2250e12, "tf32": 1125e12, "fp32": 75e12},
        "NVIDIA Blackwell datasheet (HGX B200, dense)",
    ),
)


@dataclass(frozen=True)
class Work:
    """What a kernel must do at least: FLOPs (a multiply-add is two), bytes, kind of arithmetic."""

    flops: int
    bytes: int
    kind: str = "f16"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}: {self.kind!r}")


@dataclass(frozen=True)
class Bound:
    """A predicted lower bound of the time of some work on a device, in microseconds."""

    device: str
    memory_us: float
    compute_us: float

    @property
    def predicted_us(self) -> float:
        """The bound itself: memory and arithmetic overlap perfectly."""
        return max(self.memory_us, self.compute_us)

    @property
    def limiter(self) -> str:
        """``memory`` or ``compute``."""
        return "memory" if self.memory_us >= self.compute_us else "compute"


def bound(work: Work, device: Device, share: float = 1.0) -> Bound:
    """Predicted bound of ``work`` on ``device``, reaching at most ``share`` of its peak arithmetic.

    >>> from fused_resnet.certify import DEVICES, Work, bound
    >>> bound(Work(flops=2 * 10**9, bytes=10**7), DEVICES[0]).limiter
    'compute'
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]: {share}")
    return Bound(
        device.name,
        memory_us=work.bytes / device.bandwidth * 1e6,
        compute_us=work.flops / (device.flops[work.kind] * share) * 1e6,
    )
