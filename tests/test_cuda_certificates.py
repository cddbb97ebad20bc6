"""The machine code of the CUDA kernels against its committed certificates; nothing is executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import certify_cuda, chain_traffic
from fused_resnet.certify import Certificate, ToolMissing, compare, load_json, to_json, tools

ARCHS = ("8.0", "9.0")

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None,
    reason="needs nvcc and a torch that was built with CUDA",
)


@pytest.fixture(scope="module")
def extension() -> Path:
    """The extension with its CUDA kernels, for the architectures that `make test` covers."""
    return certify_cuda.build(ARCHS)


@pytest.fixture(scope="module")
def certificates(extension: Path) -> dict[str, Certificate]:
    try:
        tools.find("nvdisasm")
    except ToolMissing as missing:
        pytest.skip(str(missing))
    return certify_cuda.certificates(extension)


@needs_cuda_build
class TestMachineCode:
    def test_imports_with_no_gpu_and_names_its_architectures(self, extension: Path) -> None:
        code = (
            "import importlib.util, torch, sys\n"
            "spec = importlib.util.spec_from_file_location('fused_resnet._C', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module.build_info()['cuda']['archs'])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(extension)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == " ".join(ARCHS)
        assert set(certify_cuda.cubins(extension)) == {"sm_80", "sm_90"}

    def test_nothing_is_spilled_and_every_block_fits(
        self, certificates: dict[str, Certificate]
    ) -> None:
        sms = {"sm_" + arch.replace(".", "") for arch in ARCHS}
        launched = [sms & set(config.archs or sms) for config in certify_cuda.configs()]
        assert len(certificates) == sum(map(len, launched))
        assert [key for key, c in certificates.items() if c.spills] == []
        assert [key for key, c in certificates.items() if not c.fits] == []

    def test_tensor_cores_bound_the_large_tiles(self, certificates: dict[str, Certificate]) -> None:
        for arithmetic in ("float16", "bfloat16", "tf32"):
            c = certificates[f"conv_implicit_gemm {arithmetic} 128x128 sm_80"]
            assert c.share is not None
            assert c.share >= 0.85
            assert c.tensor_kind == "mma.sync"

    def test_chained_bottlenecks_copy_asynchronously(
        self, certificates: dict[str, Certificate]
    ) -> None:
        for key, c in certificates.items():
            if key.startswith("bottleneck_chain "):
                assert c.async_in_loop, key
                assert set(c.widths("LDGSTS")) == {16}, key
            if key.startswith("bottleneck_chain ") and key.endswith("sm_80"):
                assert c.share is not None
                assert c.share >= 0.6, key

    def test_main_loops_divide_nothing_and_copy_asynchronously(
        self, certificates: dict[str, Certificate]
    ) -> None:
        for key, c in certificates.items():
            assert c.loop is not None
            assert c.loop.divisions == 0, key
            if key.startswith("conv_implicit_gemm "):
                assert c.async_in_loop
                assert set(c.widths("LDGSTS")) == {16}

    def test_no_figure_is_worse_than_the_committed_one(
        self, certificates: dict[str, Certificate]
    ) -> None:
        committed = load_json(certify_cuda.COMMITTED)
        now = json.loads(to_json(certificates, certify_cuda.toolchain()))
        if committed["toolchain"] != now["toolchain"]:
            pytest.skip(f"certificates are of {committed['toolchain']}, not {now['toolchain']}")
        assert [str(worse) for worse in compare(committed, now, partial=True)] == []


#: Layers small enough to be counted again here: two 3x3, two 1x1, one of stride 2.
RECOUNTED = (6, 9, 21, 22, 25)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return load_json(certify_cuda.COMMITTED)


@pytest.mark.parametrize("index", RECOUNTED)
def test_layer_moves_no_more_than_committed(committed: dict[str, Any], index: int) -> None:
    now = {"emulated": {str(index): certify_cuda.traffic(index)}}
    assert certify_cuda.worse_traffic(committed, now) == []


def test_layers_move_what_they_must(committed: dict[str, Any]) -> None:
    assert len(committed["emulated"]) == len(certify_cuda.LAYERS)
    for layer in committed["emulated"].values():
        assert layer["activation_bytes"] <= 1.05 * layer["least_activation_bytes"], layer
        assert set(layer["conflicts"].values()) == {1.0}, layer


@pytest.mark.parametrize("index", range(len(certify_cuda.CHAINS)))
def test_chain_moves_no_more_than_committed(committed: dict[str, Any], index: int) -> None:
    chain = certify_cuda.chain_traffic(certify_cuda.CHAINS[index])
    assert certify_cuda.worse_chains(committed, {"emulated_chains": [chain]}) == []


def test_chains_move_what_they_must_and_less_than_tritons(committed: dict[str, Any]) -> None:
    assert len(committed["emulated_chains"]) == len(certify_cuda.CHAINS)
    for chain in committed["emulated_chains"]:
        assert chain["dram"] <= 1.05 * chain["least_dram"], chain
        assert chain["l2"] < chain["triton_l2"], chain
        assert set(chain["conflicts"].values()) == {1.0}, chain


def test_the_document_shows_these_counts(committed: dict[str, Any]) -> None:
    text = (certify_cuda.ROOT / "docs" / "chained-bottlenecks.md").read_text()
    for chain in committed["emulated_chains"]:
        mid, way, block = re.findall(r"\w+", chain["kernel"])[-3:]
        pixels = " (even pixels)" if block == "wider" else ""
        counts = " | ".join(f"{chain[name]:.0f}" for name in ("dram", "l2", "triton_l2"))
        assert f"| {mid} {way} {block}{pixels} | {counts} |" in text


def test_chains_move_what_the_model_of_their_traffic_says(committed: dict[str, Any]) -> None:
    """The emulator's count against the formula behind the tables of docs/chained-bottlenecks.md."""
    for case, counted in zip(certify_cuda.CHAINS, committed["emulated_chains"], strict=True):
        options = dict(case.options)
        pixels = case.size**2
        expected = chain_traffic.link(
            1,
            pixels,
            case.mid,
            options.get("following", case.mid),
            options.get("stride", 1),
            options.get("proj", 0),
            options.get("store", "all"),
        )
        assert counted["dram"] * pixels == pytest.approx(expected.bytes, rel=1e-9), case


def test_a_worse_count_is_noticed(committed: dict[str, Any]) -> None:
    worse = json.loads(json.dumps(committed))
    worse["emulated"]["0"]["activation_bytes"] += 1
    worse["emulated"]["1"]["conflicts"]["ldmatrix"] += 0.5
    worse["emulated_chains"][0]["l2"] += 1
    assert len(certify_cuda.worse_traffic(committed, worse)) == 2
    assert len(certify_cuda.worse_chains(committed, worse)) == 1
