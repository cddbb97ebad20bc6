"""The committed certificates of the Triton kernels: complete, without complaints, up to date."""

import json
import os

import pytest

pytest.importorskip("triton", reason="this torch comes without Triton")

import triton

from benchmarks import certificate_tables
from fused_resnet.backends.triton_.certify import (
    cases,
    certify_case,
    chain_cases,
    complaints,
    name_of,
)
from fused_resnet.certify import certificates_of, compare, load_json, to_json

FILES = {"conv": certificate_tables.CONV, "chain": certificate_tables.CHAIN}

both = pytest.mark.parametrize("kind", FILES)


@pytest.fixture(scope="module")
def committed():
    return {kind: load_json(path) for kind, path in FILES.items()}


@pytest.fixture(scope="module")
def expected():
    """Every case by name; chains that share a code share a name, and each has its own promises."""
    found = {"conv": cases(), "chain": chain_cases()}
    return {kind: [(name_of(case), case) for case in every] for kind, every in found.items()}


@both
def test_every_code_that_the_heuristic_returns_has_a_certificate(committed, expected, kind):
    assert {name for name, _ in expected[kind]} - set(committed[kind]["certificates"]) == set()


@both
def test_certificates_are_of_codes_that_the_heuristic_returns(committed, expected, kind):
    assert set(committed[kind]["certificates"]) <= {name for name, _ in expected[kind]}


@both
def test_committed_certificates_keep_the_promises(committed, expected, kind):
    certificates = certificates_of(committed[kind])
    judged = [(name, case) for name, case in expected[kind] if name in certificates]
    assert judged
    assert not [
        (name, why) for name, case in judged for why in complaints(case, certificates[name])
    ]


def test_the_page_is_that_of_the_committed_certificates(committed):
    conv, chain = (certificates_of(committed[kind]) for kind in ("conv", "chain"))
    assert certificate_tables.PATH.read_text() == certificate_tables.document(conv, chain)


#: Words of the names of certificates that are made again here.
AGAIN = (
    ("sm_80 | gemm_kernel", "1x1 256->64 1x56x56 float16"),
    ("sm_86 | conv_kernel", "3x3 64->64 1x56x56 float16 relu"),
    ("sm_90 | gemm_tma_kernel", "1x1 64->256 1x56x56 float16 add_relu"),
    ("sm_100 | conv_boxes_kernel", "3x3/2 128->128 32x56x56 float16"),
    ("sm_120 | conv_kernel", "3x3 64->64 1x56x56 float32 relu | tile"),
)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and cannot compile"
)
@pytest.mark.parametrize("words", AGAIN, ids=lambda words: words[0])
def test_no_figure_is_worse_than_the_committed_one(committed, expected, words):
    toolchain = committed["conv"]["toolchain"]
    if toolchain["triton"] != triton.__version__:
        pytest.skip(f"certificates are of {toolchain}, not of Triton {triton.__version__}")
    name, case = next(
        (name, case) for name, case in expected["conv"] if all(word in name for word in words)
    )
    assert name in committed["conv"]["certificates"]
    now = json.loads(to_json({name: certify_case(case)}, toolchain))
    assert compare(committed["conv"], now, partial=True) == []
