"""Judge compiled GPU kernels with no GPU: certificates read from machine code.

    certificate = certify(cubin, threads=256, dynamic_shared=98304, work=Work(flops, bytes, "f16"))
    certificate.spills, certificate.share, certificate.occupancy.blocks

What is exact: registers, local memory and spills, static shared memory, instruction counts, the
kinds of tensor instructions, the widths of global accesses, which copies are asynchronous. They are
read from the cubin by ``cuobjdump`` and ``nvdisasm``, which come with Triton.

What is computed by NVIDIA's published rules: occupancy.

What is a model, and always labelled *predicted*: the cycles of the main loop and the share of the
tensor rate that they allow (``model.py`` lists the assumptions), and roofline times
(``roofline.py``). A share near 1 says that nothing in the loop's instruction mix stands in the way;
it does not say that the kernel will reach it, since latency, bank conflicts, waves and clocks are
outside the model.
"""

from .arch import ARCHS, Arch, arch
from .certificate import (
    Certificate,
    PtxasReport,
    certify,
    certify_all,
    certify_triton,
    parse_ptxas,
)
from .model import Access, MainLoop, TensorOp
from .occupancy import Occupancy, occupancy
from .report import LABEL, Worse, certificates_of, compare, load_json, table, to_json
from .roofline import DEVICES, Bound, Device, Work, bound
from .tools import ToolMissing

__all__ = [
    "ARCHS",
    "DEVICES",
    "LABEL",
    "Access",
    "Arch",
    "Bound",
    "Certificate",
    "Device",
    "MainLoop",
    "Occupancy",
    "PtxasReport",
    "TensorOp",
    "ToolMissing",
    "Work",
    "Worse",
    "arch",
    "bound",
    "certificates_of",
    "certify",
    "certify_all",
    "certify_triton",
    "compare",
    "load_json",
    "occupancy",
    "parse_ptxas",
    "table",
    "to_json",
]
