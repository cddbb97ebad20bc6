"""The report page and the run behind it: what was measured is shown, and nothing twice."""

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fused_resnet import bench, rooflines, zoo
from fused_resnet.bench import Case, Measured, Report, Result, Settings
from fused_resnet.cli import app
from fused_resnet.console import UserError
from fused_resnet.contenders import CONTENDERS
from fused_resnet.machine import Machine
from fused_resnet.problem import ConvProblem, MaxPool
from fused_resnet.report import charts, document, page, run
from fused_resnet.report.charts import Scale, number
from fused_resnet.report.document import percentile
from fused_resnet.rooflines import Ceiling, LayerTime, NetworkLayers

TINY = Settings(
    models=("cifar_resnet8",), batches=(1, 2), dtypes=(torch.float32,), seconds=0.0, memory=False
)


def made_up(models=("resnet18", "resnet50"), batches=(1, 4, 16)) -> Report:
    """A report with every kind of figure in it. Its figures are drawn, not measured."""
    draw = random.Random(0)
    report = Report(
        Machine("Some CPU @ 2 GHz", 2, 1 << 34, "AVX512", ("avx512_bf16",), (), "Linux x86_64"),
        {"python": "3.11", "torch": "2.14.1"},
        ["fused-resnet", "bench", "--report", "<dir>"],
        "2026-01-02T03:04:05+00:00",
        notes=["resnet18 has random weights"],
        pending=["resnet50, batch 64, float32"],
    )
    speeds = {"stock_nchw": 40, "stock_nhwc": 52, "compile": 60, "fused": 75}
    for model in models:
        for dtype in ("float32", "bfloat16"):
            for batch in batches:
                case = Case(model, "random weights", "6 photos", dtype, batch, 224, "cpu", 2)
                found = {}
                for key, speed in speeds.items():
                    second = batch**0.85 / speed / (2 if dtype == "bfloat16" else 1)
                    times = [second * draw.lognormvariate(0, 0.05) for _ in range(120)]
                    found[key] = Measured(
                        error=1.234e-6 if dtype == "float32" else 7e-3,
                        top1=1.0,
                        seconds=times,
                        calls=2,
                        latencies=times,
                        first_call=12.5 if key == "compile" else 0.8,
                        peak_memory=50_000_000 * batch,
                        memory_method="counted",
                    )
                if dtype == "bfloat16":
                    found["compile"] = Measured(missing="no <compiler> here")
                report.results.append(Result(case, found))
            layers = [
                LayerTime(
                    f"layer{i}.0.conv1", f"conv 3x3 {c}->{c}", 3, "library/onednn",
                    flops=10**9, min_bytes=4 * 10**6 * i, stock_bytes=2 * 10**7 * i,
                    fused=[0.003 * i] * 5, stock=[0.0045 * i] * 5,
                )
                for i, c in ((1, 64), (2, 128), (3, 256))
            ]  # fmt: skip
            report.layers.append(NetworkLayers(model, dtype, max(batches), layers))
    report.ceilings = [Ceiling("float32", 5e11, 2e10), Ceiling("bfloat16", 1e12, 2e10)]
    return report


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects what tests ask for."""

    EMPTY = frozenset({"meta", "path"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tables, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def report():
    return made_up()


@pytest.fixture(scope="module")
def shown(report):
    return _Page(page(report))


def test_the_page_stands_by_itself(shown):
    """No style, script, font or picture from elsewhere; every link within the page has a target."""
    inside = {link[1:] for link in shown.links if link.startswith("#")}
    assert {link for link in shown.links if not link.startswith("#")} == {"results.json"}
    assert inside <= set(shown.ids)
    assert len(shown.ids) == len(set(shown.ids))


def test_every_timed_contender_of_every_case_is_in_a_table(report, shown):
    tables = {t[0][0] + str(i): t for i, t in enumerate(shown.tables)}
    numbers = [t for t in tables.values() if t[0][:3] == ["batch", "contender", "images/s"]]
    assert len(numbers) == 4
    found = {
        (i, row[0], row[1]): row[2] for i, t in enumerate(numbers) for row in t[1:]
    }  # Tables come in the order of networks and dtypes.
    for n, result in enumerate(report.results):
        for key, m in result.contenders.items():
            if m.missing:
                continue
            label = bench.CONTENDERS[key].label
            speed = result.images_per_second(key).median
            assert found[n // 3, str(result.case.batch), label] == number(speed)


def test_the_headline_is_the_geometric_mean(report):
    text = page(report)
    ratios = [r.speedup("fused", "stock_nchw").median for r in report.results]
    mean = torch.tensor(ratios).log().mean().exp().item()
    assert f"<strong>{mean:.2f}x</strong> the speed of stock PyTorch as it comes" in text


def test_every_figure_says_whether_it_was_measured(report):
    figures = re.findall(r"<figcaption>.*?</figcaption>", page(report))
    assert len(figures) >= 4 * 7
    tags = [re.findall(r'class="tag (\w+)"', f) for f in figures]
    assert all(len(t) == 1 for t in tags)
    predicted = [f for f, t in zip(figures, tags, strict=True) if t == ["predicted"]]
    assert len(predicted) == 4
    assert all("Bytes through memory" in f for f in predicted)


def test_what_did_not_run_says_why_in_escaped_words(shown, report):
    assert "<compiler>" not in page(report)
    [table] = [t for t in shown.tables if t[0][1] == "reason"]
    assert table[1][:2] == ["torch.compile", "no <compiler> here"]
    assert table[1][2].count("bfloat16") == 6


def test_an_unfinished_run_says_what_is_missing(report, shown):
    assert "resnet50, batch 64, float32" in "".join(shown.text)
    whole = replace(report, pending=[])
    assert "Incomplete" not in page(whole)
    assert "Incomplete" in page(replace(whole, complete=False))


def test_wrong_results_lead_the_page(report):
    wrong = made_up(models=("resnet18",))
    wrong.results[0].contenders["fused"] = Measured(error=1.0, correct=False, note="10 times")
    text = page(wrong)
    assert "1 results were wrong and not timed" in text
    assert "resnet18, batch 1, float32, fused: 10 times" in text


def test_a_page_of_what_bench_alone_measured():
    """Without latencies, layers, memory: those figures are left out, the others stand."""
    text = page(bench.bench(replace(TINY, batches=(2,))))
    _Page(text)
    assert "Throughput" in text
    for absent in ("Latency", "Roofline", "First call", "Batch scaling"):
        assert f"<strong>{absent}</strong>" not in text


def test_percentiles_need_enough_calls():
    calls = Measured(latencies=[float(i) for i in range(1, 102)])
    assert [percentile(calls, p) for p in (50, 90, 99)] == [51.0, 91.0, 100.0]
    few = Measured(latencies=[1.0, 2.0, 3.0])
    assert [percentile(few, p) for p in (50, 90, 99)] == [2.0, None, None]
    assert percentile(Measured(), 50) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (99.96, "100.0"), (4.5678, "4.57"), (0.0123, "0.0123")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_scales():
    linear = Scale.of([3.0, 87.0])
    assert linear.place(0) == 0
    assert linear.place(87) == 1
    assert linear.ticks() == [0, 20, 40, 60, 80]
    log = Scale.of([3e-7, 2e-3], log=True)
    assert (log.low, log.high) == pytest.approx((1e-7, 1e-2))
    assert log.place(1e-7) == 0
    assert log.place(10**-4.5) == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------
# The run.
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """Which calls were timed, by the number of contenders in a round; the ceilings are made up."""
    rounds = []
    right = bench.interleave

    def interleave(runs, inputs, **kwargs):
        rounds.append(len(runs))
        return right(runs, inputs, **kwargs)

    monkeypatch.setattr(bench, "interleave", interleave)
    monkeypatch.setattr("fused_resnet.report.runner.interleave", interleave)
    monkeypatch.setattr(
        "fused_resnet.report.runner.ceiling", lambda _dtype, _device: Ceiling("float32", 1e11, 1e10)
    )
    return rounds


def test_a_run_writes_data_and_page_and_is_not_repeated(tmp_path, timed):
    report = run(TINY, tmp_path)
    assert report.complete
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["results"]) == 2
    assert all(m["latencies"] for r in data["results"] for m in r["contenders"].values())
    [network] = report.layers
    assert (network.model, network.batch) == ("cifar_resnet8", 2)
    assert "Roofline" in (tmp_path / "index.html").read_text()
    once = len(timed)
    again = run(TINY, tmp_path)
    assert len(timed) == once
    assert again.results == Report.load(tmp_path / "results.json").results == report.results
    more = run(replace(TINY, batches=(1, 2, 3)), tmp_path)
    assert [r.case.batch for r in more.results] == [1, 2, 3]
    assert len(timed) == once + 2  # Blocks and single calls of one case; the layers are known.


def test_ctrl_c_loses_one_case_and_the_next_run_goes_on(tmp_path, timed, monkeypatch):
    measure = bench._Stage.measure

    def interrupted(stage, result, *args):
        if result.case.batch == 2:
            raise KeyboardInterrupt
        measure(stage, result, *args)

    monkeypatch.setattr(bench._Stage, "measure", interrupted)
    report = run(TINY, tmp_path)
    assert not report.complete
    assert [r.case.batch for r in Report.load(tmp_path / "results.json").results] == [1]
    assert Report.load(tmp_path / "results.json").pending == ["cifar_resnet8, batch 2, float32"]
    assert "Incomplete" in (tmp_path / "index.html").read_text()
    monkeypatch.setattr(bench._Stage, "measure", measure)
    report = run(TINY, tmp_path)
    assert report.complete
    assert [r.case.batch for r in report.results] == [1, 2]


def test_nothing_begins_after_the_budget(tmp_path, timed):
    report = run(TINY, tmp_path, budget=-1.0)
    assert timed == []
    assert report.pending == ["cifar_resnet8, batch 1, float32", "cifar_resnet8, batch 2, float32"]
    assert run(TINY, tmp_path).pending == []


def test_results_of_other_settings_are_not_mixed(tmp_path, timed):
    run(TINY, tmp_path, budget=-1.0)
    with pytest.raises(UserError, match="measured with other threads; use another folder"):
        run(replace(TINY, threads=3), tmp_path)
    run(replace(TINY, threads=3), tmp_path, budget=-1.0, fresh=True)


def test_on_the_command_line(tmp_path, timed):
    command = ["bench", "cifar_resnet8", "-b", "1", "-t", "fp32", "--seconds", "0", "--no-memory"]
    names = "stock_nhwc,fused"
    result = CliRunner().invoke(
        app, [*command, "--report", str(tmp_path / "r"), "--contenders", names]
    )
    assert result.exit_code == 0, result.output
    assert "index.html" in result.stdout
    report = Report.load(tmp_path / "r" / "results.json")
    assert list(report.results[0].contenders) == ["stock_nhwc", "fused"]


# --------------------------------------------------------------------------------------------------
# Rooflines.
# --------------------------------------------------------------------------------------------------


def test_layers_are_the_networks_convolutions():
    network = zoo.load("cifar_resnet8")
    seen = []

    def time(calls):
        seen.append(calls)
        return {key: [1.0, 2.0] for key in calls}

    with torch.inference_mode():
        x = torch.randn(2, 3, 32, 32)
        layers = rooflines.measure_layers(zoo.fused("cifar_resnet8", network.model), x, time)
        convs = [m for m in network.model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert sum(layer.count for layer in layers) == len(convs) == 7
        assert layers[0].name == "conv1"
        assert layers[0].flops == 2 * 2 * 32 * 32 * 16 * 3 * 9
        assert layers[0].fused == [1.0, 2.0]
        for calls in seen:
            torch.testing.assert_close(calls["fused"](), calls["stock"](), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("epilogue", "pool", "passes"),
    [
        ("none", None, 3),  # Convolution writes, batch norm reads and writes.
        ("relu", None, 5),
        ("add", None, 6),
        ("add_relu", None, 8),
        ("relu_add_relu", None, 10),
        ("relu", MaxPool((3, 3), (2, 2), (1, 1)), 6.25),
    ],
)
def test_bytes_that_stock_torch_moves(epilogue, pool, passes):
    problem = ConvProblem(
        2, 8, 16, 16, 4, 3, 3, (1, 1), (1, 1), (1, 1), 1, epilogue, torch.bfloat16, pool=pool
    )
    out = 2 * 2 * 4 * 16 * 16
    read = 2 * (2 * 8 * 16 * 16 + 4 * 8 * 9)
    assert rooflines.stock_bytes(problem) == read + passes * out


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(rooflines, "_GEMM", 128)
    monkeypatch.setattr(rooflines, "_COPIED", 1 << 20)
    times = iter([0.0, 2.0, 2.0, 3.0])

    def clock():
        return next(times)

    monkeypatch.setattr(rooflines, "_REPEATS", 1)
    monkeypatch.setattr(rooflines, "clock", clock)
    found = rooflines.ceiling(torch.float32, torch.device("cpu"))
    assert found == Ceiling("float32", 2 * 128**3 / 2.0, 2 * (1 << 20) / 1.0)


def test_no_two_contenders_have_one_marker():
    """For eyes that do not tell colours apart, and of colours there are enough."""
    numbers = [document._series(key) for key in CONTENDERS]
    assert len({charts._marker(n, 0, 0) for n in numbers}) == len(set(numbers)) == len(CONTENDERS)
    css = (Path(document.__file__).parent / "page.css").read_text()
    for n in numbers:
        assert css.count(f"--s{n}: #") == 2  # Light and dark.
