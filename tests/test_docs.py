"""The tutorial's blocks, run in order in an empty folder; and that links and commands in the docs exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```(\w+)(?: file=(\S+))?\n(.*?)```", re.DOTALL)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "dynams").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tools.cli "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    output = ""
    for language, name, text in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text()):
        if name:
            (tmp_path / name).write_text(text)
        elif language == "bash":
            done = subprocess.run(
                ["bash", "-ec", text], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
            )
            assert done.returncode == 0, (text, done.stdout, done.stderr)
            output += done.stdout
    assert "1,437 samples in 8 shards" in output or "1,437 samples" in output
    assert "epoch 3: 432 samples" in output
    assert "round 4 published" in output or "round 4" in output
    assert "up to date" in output


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_commands_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for command in re.findall(r"^\s*dynams (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, f"{page.name} uses dynams {command}"


def test_the_readme_shows_the_interface_of_the_design() -> None:
    block = next(text for language, _, text in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python")
    compile(block, "README.md", "exec")
    assert block.index("SelectedDataset(store") < block.index("run_round(store") < block.index("set_epoch(epoch")


def message_patterns() -> list[re.Pattern[str]]:
    """A pattern for each line of a message that the sources can make, whatever is filled in."""
    found = []
    for path in (file for folder in ("dynams_stream", "pipeline", "tools") for file in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "\0"
                for part in parts
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
            lines = (line.strip() for line in text.split("\n"))
            found += [line for line in lines if len(line.replace("\0", "")) >= 20]
    return [re.compile(".*".join(map(re.escape, line.split("\0")))) for line in found]


def test_the_messages_of_the_operations_page_are_those_of_the_sources() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    quoted = [
        line.strip().removeprefix("error: ")
        for language, _, block in BLOCK.findall(text)
        if language == "text"
        for line in block.splitlines()
    ]
    assert len(quoted) > 10
    patterns = message_patterns()
    assert not any(pattern.fullmatch("runs/a: nothing that a source says") for pattern in patterns)
    for message in quoted:
        assert any(pattern.fullmatch(message) for pattern in patterns), message


def test_the_operations_page_s_sections_are_there() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
