"""The timing library: turns, ratios, reports that come back whole. No test asserts a time."""

import json
from dataclasses import replace

import pytest
import torch

from fused_resnet import bench, bench_table, console, probe, zoo
from fused_resnet.bench import (
    Case,
    Measured,
    Report,
    Result,
    Settings,
    Spread,
    interleave,
)
from fused_resnet.console import UserError
from fused_resnet.contenders import CONTENDERS, DEFAULT, Contender

TINY = Settings(
    models=("cifar_resnet8",), batches=(1, 3), dtypes=(torch.float32,), seconds=0.0, memory=False
)


@pytest.fixture(scope="module")
def report():
    return bench.bench(TINY)


class _Log:
    """A contender that writes down who was called with what."""

    def __init__(self, name, calls, fail_at=None):
        self.name, self.calls, self.fail_at = name, calls, fail_at

    def __call__(self, x):
        self.calls.append((self.name, x))
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt


@pytest.fixture
def one_call_a_block(monkeypatch):
    monkeypatch.setattr(bench, "_BLOCK_SECONDS", 0.0)


@pytest.mark.usefixtures("one_call_a_block")
def test_contenders_take_turns_in_rotating_order():
    calls = []
    runs = {name: _Log(name, calls) for name in "abc"}
    rounds = interleave(runs, {name: [0] for name in "abc"}, seconds=0.0, min_rounds=4)
    assert "".join(name for name, _ in calls[3:]) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(s) for name, s in rounds.seconds.items()} == dict.fromkeys("abc", 4)
    assert rounds.calls == dict.fromkeys("abc", 1)
    assert rounds.complete


@pytest.mark.usefixtures("one_call_a_block")
def test_inputs_rotate_after_every_one_was_warmed_up():
    calls = []
    interleave({"a": _Log("a", calls)}, {"a": [0, 1, 2]}, seconds=0.0, min_rounds=4)
    assert [x for _, x in calls] == [0, 1, 2, 0, 1, 2, 0]


def test_quick_calls_are_timed_in_blocks():
    calls = []
    rounds = interleave({"a": _Log("a", calls)}, {"a": [0, 1]}, seconds=0.0, min_rounds=2)
    assert rounds.calls["a"] > 1
    assert len(calls) == 2 + 2 * rounds.calls["a"]
    assert [x for _, x in calls[2:6]] == [0, 1, 0, 1]


@pytest.mark.usefixtures("one_call_a_block")
def test_time_left_means_more_rounds_up_to_the_limit():
    runs = {"a": _Log("a", [])}
    rounds = interleave(runs, {"a": [0]}, seconds=1e9, min_rounds=1, max_rounds=7)
    assert len(rounds.seconds["a"]) == 7


@pytest.mark.usefixtures("one_call_a_block")
def test_ctrl_c_keeps_the_complete_rounds():
    calls = []
    runs = {name: _Log(name, calls, fail_at=2 + 2 * 2 + 2) for name in "ab"}
    rounds = interleave(runs, {name: [0] for name in "ab"}, seconds=1e9)
    assert not rounds.complete
    assert {name: len(s) for name, s in rounds.seconds.items()} == {"a": 2, "b": 2}


def _result(**seconds):
    case = Case("net", "random weights", "2 photos", "float32", 4, 32, "cpu", 1)
    return Result(case, {k: Measured(seconds=v, error=1e-7) for k, v in seconds.items()})


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]).half_width == 1.0
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_a_speedup_is_the_median_of_the_ratios_within_rounds():
    # The machine slows down tenfold after the first round, which concerns both alike.
    result = _result(fused=[1.0, 10.0, 10.0], stock_nchw=[2.0, 20.0, 40.0])
    assert result.speedup("fused", "stock_nchw").median == 2.0
    assert result.speedup("stock_nchw", "fused").median == 0.5
    assert result.images_per_second("fused").median == 0.4
    assert result.speedup("fused", "stock_nhwc") is None


def test_bench_measures_every_contender_in_every_case(report):
    assert report.complete
    assert report.correct
    assert [r.case.batch for r in report.results] == [1, 3]
    for result in report.results:
        assert result.contenders.keys() == set(DEFAULT)
        for measured in result.contenders.values():
            assert len(measured.seconds) >= 5
            assert 0 < measured.error < 1e-4
            assert 0 <= measured.top1 <= 1
        assert result.case.size == 32


def test_bench_says_that_weights_are_random(report):
    assert any("random weights" in note for note in report.notes)


def test_threads_are_as_asked_for_and_then_as_before(monkeypatch):
    before, within = torch.get_num_threads(), []
    monkeypatch.setattr(bench, "_bench", lambda *_: within.append(torch.get_num_threads()))
    bench.bench(replace(TINY, threads=before + 1))
    assert within == [before + 1]
    assert torch.get_num_threads() == before


def test_a_forced_backend_runs_and_is_recorded():
    report = bench.bench(replace(TINY, batches=(1,), backends=("torch",)))
    assert report.results[0].case.backends == ("torch",)
    assert report.correct


def test_a_report_comes_back_whole(report, tmp_path):
    path = tmp_path / "r.json"
    report.save(path)
    again = Report.load(path)
    assert again == report
    assert again.results[0].speedup("fused", "stock_nchw") is not None
    data = json.loads(path.read_text())
    assert data["schema"] == "fused_resnet.bench/1"
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"schema": "fused_resnet.bench/0"}', "schema fused_resnet.bench/0"), ("[]", "schema None")],
)
def test_another_format_is_refused(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Report.load(path)


def test_files_that_are_no_reports(tmp_path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Report.load(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot read"):
        Report.load(tmp_path / "nothing.json")


@pytest.fixture
def wrong_contender(monkeypatch):
    def make(_name, stock, _example):
        return lambda x: stock(x) * 1.01

    wrong = replace(CONTENDERS["fused"], make=make)
    monkeypatch.setitem(CONTENDERS, "fused", wrong)


@pytest.mark.usefixtures("wrong_contender")
def test_what_is_wrong_is_not_timed():
    report = bench.bench(replace(TINY, batches=(2,)))
    measured = report.results[0].contenders
    assert not measured["fused"].correct
    assert measured["fused"].seconds == []
    assert measured["stock_nchw"].seconds
    assert not report.correct
    text = _text(report)
    assert "WRONG" in text
    assert "times stock's error" in text


def test_ctrl_c_leaves_what_was_measured(monkeypatch):
    cases = []

    def stop_in_second_case(*args, **kwargs):
        cases.append(1)
        rounds = interleave(*args, **kwargs)
        rounds.complete = len(cases) < 2
        return rounds

    monkeypatch.setattr(bench, "interleave", stop_in_second_case)
    report = bench.bench(replace(TINY, batches=(1, 2, 3)))
    assert not report.complete
    assert [r.case.batch for r in report.results] == [1, 2]
    assert "Interrupted" in _text(report)


def _text(report):
    return " ".join(
        console.plain(part, width=200).replace("\n", " ") for part in bench_table.parts(report)
    )


def test_the_table_shows_what_was_measured(report):
    text = _text(report)
    for label in ("stock NCHW", "stock NHWC", "fused", "fp32 x1", "fp32 x3", "What it means"):
        assert label in text


@pytest.mark.parametrize(
    ("stock", "words"),
    [
        ([3.0, 3.0, 3.0], "3.00x as fast as"),
        ([0.5, 0.5, 0.5], "slower (0.50x) than"),
        ([0.5, 1.1, 3.0], "neither faster nor slower beyond the noise (1.10x) than"),
    ],
)
def test_the_meaning_follows_the_figures(stock, words):
    result = _result(fused=[1.0, 1.0, 1.0], stock_nchw=stock, stock_nhwc=[1.0, 1.0, 1.0])
    assert words in console.plain(bench_table.meaning(result), width=200)


@pytest.fixture
def task(tmp_path):
    network = zoo.load("cifar_resnet8")
    torch.save(network.model.state_dict(), tmp_path / "weights.pt")
    torch.save(torch.rand(64, 3, 32, 32), tmp_path / "inputs.pt")
    return probe.ProbeTask(
        "cifar_resnet8",
        str(tmp_path / "weights.pt"),
        str(tmp_path / "inputs.pt"),
        "fused",
        "float32",
        "cpu",
        1,
    )


def test_a_probe_measures_in_a_process_of_its_own(task):
    found = probe.measure(task)
    assert isinstance(found, probe.Probe), found
    assert found.first_call > 0
    # Input 64 x 3 x 32 x 32, and the first stage's activations of 64 x 16 x 32 x 32, in fp32.
    activations = 64 * 16 * 32 * 32 * 4
    assert found.peak_memory is None or found.peak_memory > activations
    assert found.serving_memory is None or found.serving_memory > activations


def test_the_peak_outlives_what_was_freed():
    cpu, size = torch.device("cpu"), 200_000_000
    before = probe._reset_peak(cpu)
    if before is None:
        pytest.skip("this system does not let a process reset its peak memory")
    torch.ones(size, dtype=torch.uint8)
    assert probe._peak(cpu)[0] - before > 0.9 * size
    again = probe._reset_peak(cpu)
    assert probe._peak(cpu)[0] - again < 0.1 * size


def test_a_probe_that_fails_says_why(task, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'OSError: out of luck' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert probe.measure(task) == "OSError: out of luck"


def test_a_probe_that_hangs_is_ended(task, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert "longer than" in probe.measure(task, timeout=0.2)


def test_first_call_and_memory_go_into_the_report(monkeypatch):
    tasks = []

    def measure(task):
        tasks.append(task)
        return (
            probe.Probe(0.5, 2_000_000, 3_000_000, "counted")
            if len(tasks) < 3
            else "no more memory"
        )

    monkeypatch.setattr(bench, "measure", measure)
    report = bench.bench(replace(TINY, batches=(2,), memory=True))
    nchw, _, fused, _ = report.results[0].contenders.values()
    assert (nchw.first_call, nchw.memory_method) == (0.5, "counted")
    assert (nchw.peak_memory, nchw.serving_memory) == (2_000_000, 3_000_000)
    assert fused.first_call is None
    assert "no more memory" in fused.note
    assert [t.contender for t in tasks] == list(DEFAULT)
    text = _text(report)
    assert "0.50 s" in text
    assert "2 MB" in text
    assert "no more memory" in text


def _peer(monkeypatch, make, **kwargs):
    peer = Contender("a peer", "peer", True, make, **kwargs)
    monkeypatch.setitem(CONTENDERS, "peer", peer)
    return replace(TINY, batches=(2,), contenders=(*DEFAULT, "peer"))


def test_a_peer_is_measured_and_need_not_meet_the_rule(monkeypatch):
    settings = _peer(monkeypatch, lambda _name, stock, _example: lambda x: stock(x) * 1.01)
    report = bench.bench(settings)
    peer = report.results[0].contenders["peer"]
    assert len(peer.seconds) >= 5
    assert peer.error == pytest.approx(0.01, rel=0.1)
    assert "times stock's error" in peer.note
    assert report.correct


def test_a_peer_is_made_with_an_example_as_it_is_called(monkeypatch):
    seen = []

    def make(name, stock, example):
        seen.append((name, example))
        return stock

    bench.bench(_peer(monkeypatch, make))
    [(name, example)] = seen
    assert name == "cifar_resnet8"
    assert example.shape == (2, 3, 32, 32)
    assert example.is_contiguous(memory_format=torch.channels_last)


def test_a_peer_that_cannot_run_says_why_and_ends_nothing(monkeypatch):
    settings = _peer(monkeypatch, None, why_missing=lambda _device, dtype: f"nothing for {dtype}")
    report = bench.bench(settings)
    peer = report.results[0].contenders["peer"]
    assert (peer.missing, peer.seconds) == ("nothing for torch.float32", [])
    assert report.results[0].contenders["fused"].seconds
    assert "a peer: could not run: nothing for torch.float32" in _text(report)


def test_a_peer_that_fails_says_why_and_ends_nothing(monkeypatch):
    def fails(_x):
        raise ZeroDivisionError("out of luck")

    report = bench.bench(_peer(monkeypatch, lambda *_args: fails))
    assert report.results[0].contenders["peer"].missing == "ZeroDivisionError: out of luck"
    assert report.results[0].contenders["fused"].seconds


@pytest.mark.parametrize(
    ("keys", "message"),
    [(("stock_nhwc", "fussed"), "unknown contender 'fussed'"), (("fused",), "add the contender")],
)
def test_contenders_that_cannot_be_compared(keys, message):
    with pytest.raises(UserError, match=message):
        bench.bench(replace(TINY, contenders=keys))


@pytest.mark.slow
def test_torch_compile_is_a_contender():
    report = bench.bench(replace(TINY, batches=(1, 2), contenders=(*DEFAULT, "compile")))
    for result in report.results:
        compiled = result.contenders["compile"]
        assert not compiled.missing
        assert compiled.seconds
        assert compiled.error < 1e-4
