"""README's Python runs as printed, and prints what README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_examples_print_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In order and in one namespace, as a reader would run them."""
    monkeypatch.chdir(tmp_path)  # They write files.
    examples = EXAMPLE.findall(README.read_text())
    assert len(examples) >= 3
    names: dict[str, object] = {}
    for code, shown in examples:
        exec(compile(code, str(README), "exec"), names)
        printed = capsys.readouterr().out
        assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


@pytest.mark.quick
def test_commands_exist() -> None:
    """Every ``fused-resnet`` command and option that README names is one that the program knows."""
    lines = re.findall(r"^    fused-resnet (.+?)(?:  +#.*)?$", README.read_text(), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        command = line.split()[0]
        result = subprocess.run(
            [sys.executable, "-m", "fused_resnet", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"},
        )
        for option in re.findall(r"--[a-z-]+", line):
            assert option in result.stdout, f"{command} knows no {option}"
