"""The tuned table's file: what is kept, bounds, and every way in which a file can be bad."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import backends, tuned_table
from fused_resnet.backends import FusedResNetWarning
from fused_resnet.tuned_table import Entry, Proof, Timing, TunedTable
from tests.helpers import CPU, conv_problem

P = conv_problem()
OP = "conv_affine_act"
FAST = Timing("library/onednn", 1e-4, 1e-7)
SLOW = Timing("torch/aten", 3e-4, 1e-7)
ENTRY = Entry(1e-7, (FAST, SLOW), (("library/cudnn_relu", "not on the CPU"),), "max", 5.0)
PROOF = Proof(("library/onednn",), ((1e-7, 2e-7),), ("a note",), seconds=6.0, when=7.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "tuned.json"


def filled(path: Path | None) -> TunedTable:
    table = TunedTable(path)
    table.put(OP, P, CPU, ENTRY)
    table.put_proof(CPU, "abc", PROOF)
    return table


def assert_empty(path: Path, message: str) -> None:
    """One warning that says ``message``, nothing in the table, and a table that works again."""
    table = TunedTable(path)
    with pytest.warns(FusedResNetWarning, match=message) as caught:
        assert table.entry(OP, P, CPU) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.put(OP, P, CPU, ENTRY)
        assert table.save()
        assert TunedTable(path).entry(OP, P, CPU) == ENTRY


# ------------------------------------------------------------------------------------- what is kept


def test_another_process_reads_what_one_wrote(path: Path) -> None:
    assert filled(path).save()
    other = TunedTable(path)
    assert other.entry(OP, P, CPU) == ENTRY
    assert other.proof(CPU, "abc") == PROOF
    assert other.entry(OP, replace(P, padding=(0, 0)), CPU) is None
    assert other.entry(OP, replace(P, x_channels_last=False), CPU) is None
    assert other.entry(OP, replace(P, dtype=torch.bfloat16), CPU) is None


def test_an_entry_holds_for_the_threads_it_was_measured_with(path: Path) -> None:
    table = filled(path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert table.entry(OP, P, CPU) is None
    finally:
        torch.set_num_threads(threads)
    assert table.entry(OP, P, CPU) == ENTRY


def test_an_entry_holds_for_the_threads_that_openmp_may_grant(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    table = filled(path)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    assert table.entry(OP, P, CPU) is None
    assert table.proof(CPU, "abc") is None
    monkeypatch.delenv("OMP_THREAD_LIMIT")
    assert table.entry(OP, P, CPU) == ENTRY


def test_an_entry_holds_for_its_versions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(path)
    monkeypatch.setattr(tuned_table, "_software", lambda: "fused_resnet 99")
    assert table.entry(OP, P, CPU) is None


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    assert not filled(None).save()


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(tuned_table.ENV, str(tmp_path / "x.json"))
    assert tuned_table.table().path == tmp_path / "x.json"
    assert tuned_table.table() is tuned_table.table()
    monkeypatch.setenv(tuned_table.ENV, "off")
    assert tuned_table.table().path is None
    tuned_table.table().put(OP, P, CPU, ENTRY)
    assert tuned_table.table().entry(OP, P, CPU) is None  # nor for this process
    monkeypatch.delenv(tuned_table.ENV)
    default = tuned_table.default_path()
    assert default is not None
    assert default.name == "tuned.json"
    assert "fused_resnet" in default.parts


# ------------------------------------------------------------------------------------------ ranking


def test_near_ties_go_to_the_earlier_kernel() -> None:
    first, second = Timing("a/simple", 1.02, 1e-7), Timing("b/clever", 1.0, 1e-7)
    assert Entry(1e-7, (first, second)).ranked(None) == [first, second]
    first = replace(first, seconds=1.04)
    assert Entry(1e-7, (first, second)).ranked(None) == [second, first]


def test_inexact_kernels_need_a_tolerance() -> None:
    winograd = Timing("cpu/winograd", 1e-6, 1e-6, exact=False)
    entry = Entry(1e-7, (winograd, SLOW))
    assert entry.ranked(None) == [SLOW]
    assert entry.ranked(1e-7) == [SLOW]
    assert entry.ranked(2e-6) == [winograd, SLOW]


# ------------------------------------------------------------------------------------------- bounds


def test_the_oldest_entries_go_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_table, "MAX_ENTRIES", 3)
    monkeypatch.setattr(tuned_table, "MAX_PROOFS", 1)
    table = TunedTable(path)
    for n in (4, 2, 5, 1, 3):
        table.put(OP, replace(P, n=n), CPU, replace(ENTRY, when=float(n)))
        table.put_proof(CPU, str(n), replace(PROOF, when=float(n)))
    assert table.save()
    other = TunedTable(path)
    assert [n for n in range(1, 6) if other.entry(OP, replace(P, n=n), CPU)] == [3, 4, 5]
    assert [n for n in range(1, 6) if other.proof(CPU, str(n))] == [5]


def test_the_oldest_environments_go_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_table, "MAX_ENVIRONMENTS", 2)
    for n in range(4):
        monkeypatch.setattr(tuned_table, "_software", lambda n=n: f"version {n}")
        table = TunedTable(path)
        table.put(OP, P, CPU, replace(ENTRY, when=float(n)))
        table.save()
    assert len(TunedTable(path).counts()) == 2
    assert TunedTable(path).entry(OP, P, CPU) is not None


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_truncated(path: Path, keep: int) -> None:
    filled(path).save()
    path.write_text(path.read_text()[:keep])
    assert_empty(path, "is not JSON")
    assert path.with_name("tuned.json.unreadable").exists()


def test_not_text(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert_empty(path, "ignored and will be rebuilt")


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": "fused_resnet.tuned/0", "environments": {}}',
        '{"somebody": "else"}',
        "[1, 2]",
        "7",
    ],
)
def test_foreign(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    assert_empty(path, "its schema is")
    assert path.with_name("tuned.json.unreadable").read_text() == text


@pytest.mark.parametrize("field", ["timings", "rejected", "stock_error", "when", "effort"])
def test_damaged_entry(path: Path, field: str) -> None:
    filled(path).save()
    data = json.loads(path.read_text())
    (environment,) = data["environments"].values()
    (entry,) = environment["entries"].values()
    del entry[field]
    path.write_text(json.dumps(data))
    assert_empty(path, "its content is damaged")


def test_a_folder_stands_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)
    table = TunedTable(path)
    with pytest.warns(FusedResNetWarning, match="cannot be read"):
        assert table.entry(OP, P, CPU) is None
    table.put(OP, P, CPU, ENTRY)
    with pytest.warns(FusedResNetWarning, match="cannot be written"):
        assert not table.save()
    assert table.entry(OP, P, CPU) == ENTRY


def test_read_only_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    # The superuser, who runs tests in containers, may write everywhere: so the error is faked.
    monkeypatch.setattr(tuned_table.tempfile, "mkstemp", refuse)
    table = filled(path)
    with pytest.warns(FusedResNetWarning, match="cannot be written: Permission denied"):
        assert not table.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not table.save()  # Said once.
    assert table.entry(OP, P, CPU) == ENTRY


def test_full_disk_leaves_the_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path).save()
    before = path.read_text()
    table = filled(path)
    table.put(OP, replace(P, n=7), CPU, ENTRY)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuned_table.os, "fsync", full)
    with pytest.warns(FusedResNetWarning, match="No space left"):
        assert not table.save()
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_a_lock_that_is_held_is_not_waited_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_table, "_PATIENCE", 0.05)
    table = filled(path)
    path.parent.mkdir()
    with (
        tuned_table._locked(path.with_name("tuned.json.lock")),
        pytest.warns(FusedResNetWarning, match="another process holds"),
    ):
        assert not table.save()
    assert table.save()


def _write(path: Path, numbers: range) -> None:
    for n in numbers:
        table = TunedTable(path)
        table.put(OP, replace(P, n=n), CPU, replace(ENTRY, when=float(n)))
        assert table.save()


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, range(i, 60, 4))) for i in range(1, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    table = TunedTable(path)
    assert [n for n in range(1, 60) if table.entry(OP, replace(P, n=n), CPU) is None] == []


def test_the_newer_entry_wins(path: Path) -> None:
    old, new = filled(path), TunedTable(path)
    new.put(OP, P, CPU, replace(ENTRY, when=9.0, stock_error=0.5))
    assert new.save()
    assert old.save()
    entry = TunedTable(path).entry(OP, P, CPU)
    assert entry is not None
    assert entry.stock_error == 0.5


def test_forked_child_reads_and_writes(path: Path) -> None:
    table = filled(path)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if table.entry(OP, P, CPU) == ENTRY and table.save() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert TunedTable(path).entry(OP, P, CPU) == ENTRY


# ------------------------------------------------------------------------------------------- choice


@pytest.mark.usefixtures("fresh_registry")
def test_what_was_measured_comes_before_the_heuristic_order(tuned: Path) -> None:
    before = backends.choose(OP, P, CPU).kernel.full_name
    assert before != "torch/aten"
    quick_stock = Entry(1e-7, (replace(FAST, seconds=1.0), SLOW), when=time.time())
    tuned_table.table().put(OP, P, CPU, quick_stock)
    assert backends.choose(OP, P, CPU).kernel.full_name == "torch/aten"
    # What the user forces comes first.
    with backends.backend("library"):
        assert backends.choose(OP, P, CPU).kernel.backend == "library"


@pytest.mark.usefixtures("fresh_registry")
def test_a_kernel_that_is_gone_is_passed_over(tuned: Path) -> None:
    gone = Timing("library/gone", 1e-9, 0.0)
    tuned_table.table().put(OP, P, CPU, Entry(1e-7, (gone, SLOW)))
    assert backends.choose(OP, P, CPU).kernel.full_name == "torch/aten"


def test_import_reads_no_table(tmp_path: Path) -> None:
    bad = tmp_path / "tuned.json"
    bad.write_text("{")
    code = "import fused_resnet"
    env = {**os.environ, tuned_table.ENV: str(bad)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    assert bad.exists()
