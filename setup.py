"""Builds the compiled extension ``fused_resnet._C`` from ``csrc/``; pyproject.toml says the rest.

The package works without the extension, so a machine that cannot compile still installs it: one
line says why the extension was left out. What the machine can compile must compile.

Environment:
    FUSED_RESNET_EXTENSION  0: leave the extension out. 1: fail where it cannot be built.
    FUSED_RESNET_CUDA       0: leave the CUDA kernels out. 1: fail where they cannot be built.
                            auto: build them if a GPU is visible.
                            Unset: build them if torch is a CUDA build and its nvcc is found.
    TORCH_CUDA_ARCH_LIST    the GPU architectures to compile for.
    CXX, CUDA_HOME, MAX_JOBS  as in torch.utils.cpp_extension.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
# Objects of files that know nothing of CUDA: those of a build without it serve one with it.
OBJECTS = ROOT / "build" / "objects"

CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo"]

# One binary serves every x86-64: a file named csrc/cpu/*_<isa>.cpp, and no other, is compiled for
# that instruction set, and csrc/cpu/isa.cpp chooses among them when the program runs.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *[*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],  # GCC 12's own avx512fintrin.h
]
X86_FLAGS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx": [*AVX512_FLAGS, "-mavx512bf16"],  # tile instructions are written out, see amx_tile.h
}


class CannotBuild(Exception):
    """This machine lacks something; the message names it."""


def setting(name: str, *allowed: str) -> str | None:
    """The value of an environment variable; None where it is unset or empty."""
    value = os.environ.get(name) or None
    if value is not None and value not in allowed:
        raise SystemExit(f"{name}={value}: expected {', '.join(allowed)} or nothing")
    return value


def compiles(flags: list[str]) -> str | None:
    """None if a Python extension can be compiled and linked, else what the compiler said."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]!r}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <concepts>\nint probe() { return 0; }\n")
        include = sysconfig.get_path("include")
        output = str(source.with_suffix(".so"))
        command = [*compiler, *flags, "-fPIC", "-shared", f"-I{include}", str(source), "-o", output]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    what = errors[0].strip() if errors else f"exit status {result.returncode}"
    return f"{shlex.join(compiler)} cannot compile a C++20 extension of Python: {what}"


def cuda_home() -> str | None:
    """The CUDA toolkit's folder, asked of nvcc since that may be a script or a link elsewhere."""
    nvcc = shutil.which("nvcc")
    if "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ or nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


def cuda_release(home: str) -> str | None:
    """The release of the toolkit's nvcc, like ``13.0``."""
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.is_file():
        return None
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+\.\d+)", result.stdout)
    return release.group(1) if release else None


def cuda_sources(cpp_extension: Any, torch: Any) -> list[str]:
    """The CUDA files to compile: none where they are not wanted or cannot be compiled."""
    wish = setting("FUSED_RESNET_CUDA", "auto", "0", "1")
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("cuda/*.cu"))
    if wish == "0" or (wish == "auto" and not torch.cuda.is_available()):
        return []
    home = cpp_extension.CUDA_HOME
    release = cuda_release(home) if home else None
    if not sources:
        reason = "csrc/cuda holds no .cu file"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif release is None:
        reason = "nvcc was not found (set CUDA_HOME)"
    elif release.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}"
    else:
        return sources
    if wish == "1":
        raise SystemExit(f"FUSED_RESNET_CUDA=1, but {reason}")
    return []


def extension() -> tuple[Extension, type[Command]]:
    """The extension and the command that builds it."""
    if sys.platform == "win32":
        raise CannotBuild("Windows is not supported")
    if reason := compiles(CXX_FLAGS):
        raise CannotBuild(reason)
    if home := cuda_home():
        os.environ["CUDA_HOME"] = home
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(f"torch cannot be imported: {error}") from error

    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    isa_flags = X86_FLAGS if x86 else {}

    def isa_of(source: str) -> str | None:
        return next((isa for isa in X86_FLAGS if source.endswith(f"_{isa}.cpp")), None)

    class BuildExtension(cpp_extension.BuildExtension):  # type: ignore[misc, name-defined]
        """Compiles what knows nothing of CUDA, each ISA's files with its flags, then the rest."""

        def build_extension(self, ext: Extension) -> None:
            for isa in (None, *isa_flags):
                args = {kind: list(args) for kind, args in ext.extra_compile_args.items()}
                args["cxx"] += isa_flags.get(isa, [])
                ext.extra_objects += self.compiler.compile(
                    [source for source in common if isa_of(source) == isa],
                    output_dir=str(OBJECTS / (isa or "any")),
                    macros=macros,
                    include_dirs=include_dirs,
                    extra_postargs=args,
                    depends=ext.depends,
                )
            ext.sources = [source for source in ext.sources if source not in common]
            super().build_extension(ext)

    # Without OpenMP at::parallel_for, whose loop is compiled here, runs on one thread.
    openmp = [] if compiles([*CXX_FLAGS, "-fopenmp"]) else ["-fopenmp"]
    kernels = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("cpu/*.cpp"))
    common = [
        *("csrc/ops_cpu.cpp", "csrc/ops_call_guard.cpp"),
        *(source for source in kernels if x86 or isa_of(source) is None),
    ]
    include_dirs = [str(CSRC), *cpp_extension.include_paths()]
    # A change of torch changes every command line, and so compiles every file anew.
    macros = [("FUSED_RESNET_TORCH_VERSION", f'"{torch.__version__}"')]
    arguments: dict[str, Any] = {
        "name": "fused_resnet._C",
        "sources": ["csrc/ops.cpp", *common],
        "include_dirs": [str(CSRC)],
        "depends": sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.*h")),
        "define_macros": [*macros],
        "extra_compile_args": {"cxx": [*CXX_FLAGS, *openmp], "nvcc": NVCC_FLAGS},
        "extra_link_args": openmp,
    }
    cuda = cuda_sources(cpp_extension, torch)
    if not cuda:
        return cpp_extension.CppExtension(**arguments), BuildExtension

    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    arguments["sources"] += cuda
    arguments["define_macros"] += [
        ("FUSED_RESNET_CUDA_VERSION", f'"{cuda_release(cpp_extension.CUDA_HOME)}"'),
        ("FUSED_RESNET_CUDA_ARCHS", f'"{archs}"'),
    ]
    ext = cpp_extension.CUDAExtension(**arguments)
    # torch's headers include those of cuBLAS, cuSPARSE and others, which a toolkit may lack and the
    # wheels beside torch bring. They come last: nvcc must find its own release of the rest first.
    packages = Path(torch.__file__).parents[1]
    ext.include_dirs += sorted(str(path) for path in packages.glob("nvidia/*/include"))
    return ext, BuildExtension


def build_arguments() -> dict[str, Any]:
    """What setup() is told of the extension: nothing where it is left out."""
    wish = setting("FUSED_RESNET_EXTENSION", "0", "1")
    if wish == "0":
        return {}
    try:
        ext, command = extension()
    except CannotBuild as reason:
        if wish == "1":
            raise SystemExit(f"FUSED_RESNET_EXTENSION=1, but {reason}") from reason
        print(f"warning: fused_resnet is installed without its extension: {reason}", flush=True)
        return {}
    return {"ext_modules": [ext], "cmdclass": {"build_ext": command}}


setup(**build_arguments())
