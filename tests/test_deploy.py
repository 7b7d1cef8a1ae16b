"""The files under deploy/: their syntax, and that every `dynams` command in them, and in docs/, is one."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.triggers import cron
from tools.cli import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())


def parse(path: Path) -> None:
    """Whatever reads a file of that kind must be able to."""
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        assert all(isinstance(document, dict) for document in yaml.safe_load_all(text))
    elif path.suffix == ".toml":
        tomllib.loads(text)
    elif path.name == "Dockerfile":
        words = [line.split()[0] for line in text.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
        assert words[0] in ("ARG", "FROM")
        assert {word for word in words if not word.isupper()} == set()
    elif path.suffix == ".py":
        ast.parse(text)
    elif path.suffix in (".sh", ".sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
    elif path.suffix in (".service", ".timer"):
        units = configparser.ConfigParser(strict=False, interpolation=None)
        units.optionxform = str  # type: ignore[assignment]
        units.read_string(text)
        assert {"Unit", "Service" if path.suffix == ".service" else "Timer"} <= set(units.sections())
    elif path.name == "crontab":
        for line in text.splitlines():
            if line and line[0] != "#":
                cron(" ".join(line.split()[:5]))
                subprocess.run(["bash", "-nc", line.split(None, 5)[5]], check=True)
    else:
        pytest.fail(f"nothing checks {path.name}")


def commands(text: str) -> list[list[str]]:
    """Every `dynams …` of a file, as words; lists of words in YAML and Python become words, too."""
    plain = re.sub(r'["\',\[\]]+', " ", re.sub(r"\\\n", " ", text))
    lines = (re.split(r"[>|;&`]|\s#", line)[0] for line in plain.splitlines() if not line.lstrip().startswith("#"))
    return [shlex.split(found) for line in lines for found in re.findall(r"\b(dynams +[a-z]+ .*)", line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_syntax_is_right(path: Path) -> None:
    parse(path)


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_its_commands_and_their_flags_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        assert words[1] in COMMANDS, words
        known = {flag for parameter in load_command(words[1]).params for flag in parameter.opts}
        unknown = [word for word in words[2:] if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, (path.name, words)


def test_the_check_can_fail() -> None:
    assert commands('command = ["dynams", "rescore", "--no-such", "x"]') == [["dynams", "rescore", "--no-such", "x"]]
    assert isinstance(load_command("rescore"), typer.core.TyperCommand)
