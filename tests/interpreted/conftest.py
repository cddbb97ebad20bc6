"""Tests that run Triton's kernels on CPU tensors: ``TRITON_INTERPRET=1 pytest tests/interpreted``.

Triton decides at import whether kernels are compiled or interpreted, so these tests need a process
of their own; in any other they are not collected. ``tests/test_triton_interpreted.py`` starts one.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
