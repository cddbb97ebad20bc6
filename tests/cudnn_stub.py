"""A CUDA driver library that knows of no device, so that cuDNN plans for GPUs that are not there.

cuDNN loads ``libcuda.so.1`` and asks it for functions by name. Each one exists here and answers
``CUDA_ERROR_NO_DEVICE``, but for those that say which driver this is and where its functions are.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

#: Functions with an answer of their own.
_ANSWERS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
enum { SUCCESS = 0, NO_DEVICE = 100, NOT_FOUND = 500 };
int cuInit(unsigned flags) { return NO_DEVICE; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 0; return NO_DEVICE; }
int cuGetErrorName(int error, const char **name) { *name = "NO_DEVICE"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "no device"; return SUCCESS; }
static int find(const char *name, void **function) {
  Dl_info self;
  dladdr((void *)cuInit, &self);
  void *library = dlopen(self.dli_fname, RTLD_LAZY);
  *function = 0;
  /* The newest version of a function is meant where its plain name is asked for. */
  for (int version = 4; version >= 2 && !*function; --version) {
    char versioned[256];
    snprintf(versioned, sizeof versioned, "%s_v%d", name, version);
    *function = dlsym(library, versioned);
  }
  if (!*function) *function = dlsym(library, name);
  return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
  return find(name, function);
}
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                        int *status) {
  int found = find(name, function);
  if (status) *status = found ? 1 : 0;
  return found;
}
"""
_ANSWERED = set(re.findall(r"^int (cu\w+)\(", _ANSWERS, re.MULTILINE))


def cudnn_libraries() -> list[Path]:
    """The shared libraries of the cuDNN that came with torch; none if it came without."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(path for folder in folders for path in Path(folder).glob("cudnn/lib/*.so.*"))


def _functions() -> set[str]:
    """Names of driver functions that occur in cuDNN's libraries."""
    names: set[str] = set()
    for path in cudnn_libraries():
        # The precompiled engines are large and reach the driver through the runtime.
        if not re.search("precompiled|adv|cnn", path.name):
            found = re.findall(
                rb"\0(cu[A-Z][A-Za-z0-9]{3,}(?:_v\d|_ptsz|_ptds)*)\0", path.read_bytes()
            )
            names |= {name.decode() for name in found}
    return {name for name in names if not name.startswith(("cuBLAS", "cuDNN", "cuDnn"))}


def build(folder: Path) -> Path:
    """Compile ``libcuda.so.1`` into ``folder``; for LD_LIBRARY_PATH of another process."""
    lines = [
        f"int {name}(void) {{ return NO_DEVICE; }}" for name in sorted(_functions() - _ANSWERED)
    ]
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_ANSWERS + "\n".join(lines))
    options = ["-shared", "-fPIC", "-fno-builtin", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", library, source, "-ldl"], check=True)
    return library
