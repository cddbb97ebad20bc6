"""README and docs: Python runs and prints what they say, commands exist, pages build."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fused_resnet.cli import app

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
#: A block of Python, and what it prints if that follows.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:    )?fused-resnet (.+?)(?:  +#.*)?$", re.MULTILINE)


def _name(path):
    return str(path.relative_to(ROOT))


def test_every_block_is_of_a_kind_that_is_tested():
    """So that no example escapes because of its label."""
    for page in PAGES:
        labels = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(labels) <= {"python", "text", "sh"}, page


@pytest.mark.parametrize("page", DOCS, ids=_name)
@pytest.mark.filterwarnings("default")
def test_examples_run_and_print_what_is_shown(page, capsys):
    """In order and in one namespace, as a reader would run them."""
    examples = EXAMPLE.findall(page.read_text())
    if not examples:
        pytest.skip("no Python on this page")
    names = {"__name__": "example"}
    for code, shown in examples:
        exec(compile(code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_readme_shows_what_each_example_prints():
    """Those that do are run by test_readme.py."""
    examples = EXAMPLE.findall(PAGES[0].read_text())
    assert all(shown for _, shown in examples)


@pytest.mark.quick
def test_commands_exist():
    """Every ``fused-resnet`` command and option on a page is one that the program knows."""
    lines = [line for page in PAGES for line in COMMAND.findall(page.read_text())]
    assert len(lines) >= 8
    commands = typer.main.get_command(app).commands
    for line in lines:
        command = line.split()[0]
        known = {o for p in commands[command].params for o in (*p.opts, *p.secondary_opts)}
        unknown = set(re.findall(r"(?<!\S)--?[a-z-]+", line)) - known
        assert not unknown, f"{command} knows no {unknown}"


def test_the_figure_of_bytes_shows_what_the_page_counts():
    page = (ROOT / "docs" / "kernels.md").read_text()
    stock, fused = re.search(r"^stock (\S+) MB, fused (\S+) MB$", page, re.MULTILINE).groups()
    figure = (ROOT / "docs" / "figures" / "bytes.svg").read_text()
    assert f">{stock}</text>" in figure
    assert f">{fused}</text>" in figure
    widths = [float(w) for w in re.findall(r'<rect x="110" .*? width="([\d.]+)"', figure)]
    assert widths[1] / widths[0] == pytest.approx(float(fused) / float(stock), abs=1e-3)
    assert f"stock {stock}, fused {fused}" in page


def test_links_between_pages_and_to_files_hold():
    """Those of README too, which mkdocs does not see."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_documentation_builds_without_warnings(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip('mkdocs is not installed: pip install "fused-resnet[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "index.html").read_text()
    assert "fused_resnet.fuse" in reference
    assert (tmp_path / "sample-report" / "index.html").is_file()
