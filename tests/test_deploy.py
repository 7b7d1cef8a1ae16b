"""The files under deploy/: their syntax, and that every `dynams` and `dask` command in them, and in docs/, is one."""

from __future__ import annotations

import ast
import configparser
import logging
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from distributed.worker_memory import parse_memory_limit

from pipeline.triggers import cron
from tools.cli import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORWARDED = {"score.sbatch": ["dynams", "score"], "eight-gpus.sh": ["dynams", "score"]}
"""Scripts that hand their arguments on to a command."""


def units(path: Path) -> configparser.ConfigParser:
    """A systemd unit's sections."""
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment]
    found.read_string(path.read_text())
    return found


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
        assert {"Unit", "Service" if path.suffix == ".service" else "Timer"} <= set(units(path).sections())
    elif path.name == "crontab":
        for line in text.splitlines():
            if line and line[0] != "#":
                cron(" ".join(line.split()[:5]))
                subprocess.run(["bash", "-nc", line.split(None, 5)[5]], check=True)
    else:
        pytest.fail(f"nothing checks {path.name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_syntax_is_right(path: Path) -> None:
    parse(path)


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """Every `dynams …` and `dask …` that a file runs or tells people to run, as words."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        return [words for language, block in blocks if language in ("", "bash") for words in shell_commands(block)]
    if path.suffix in (".yaml", ".yml"):
        return [words for document in yaml.safe_load_all(text) for words in yaml_commands(document)]
    if path.suffix == ".py":
        return list(python_commands(ast.parse(text)))
    return shell_commands(re.sub(r"^# +(?=dynams |sbatch |deploy/)", "", text, flags=re.MULTILINE))


def shell_commands(text: str) -> list[list[str]]:
    """Those in the lines of a shell script, or of a file whose lines are `Key=command`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"\b(dynams|dask|score\.sbatch|eight-gpus\.sh) ", line) or line.lstrip().startswith("#"):
            continue
        lexer = shlex.shlex(line.removeprefix("ExecStart="), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set("();<>|&"):
                found += command_in(words)
                words = []
            else:
                words.append(token)
    return found


def command_in(words: list[str]) -> list[list[str]]:
    """The command among a line's words, behind variables, `exec` and the like; none, or one."""
    for place, word in enumerate(words):
        name = Path(word).name
        if name in ("dynams", "dask") and words[place + 1 :]:
            return [[name, *words[place + 1 :]]]
        if name in FORWARDED and word == f"deploy/{name}":
            return [[*FORWARDED[name], *words[place + 1 :]]]
    return []


def yaml_commands(value: Any) -> Iterator[list[str]]:
    """A container's `command` with its `args`."""
    if isinstance(value, dict):
        yield from command_in([*value.get("command", ()), *value.get("args", ())])
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from yaml_commands(one)


def python_commands(tree: ast.AST) -> Iterator[list[str]]:
    """Lists of words, and strings that are a command line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List):
            yield from command_in([str(ast.literal_eval(word)) for word in node.elts])
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            yield from shell_commands(str(node.value.value))


def parsed(words: list[str], folder: Path) -> dict[str, Any]:
    """What the command itself makes of its arguments: all that it needs, no option unknown, no value of a wrong type.

    Args:
        words: the command line. "…" and "$@" stand for what people give: `--config run.toml`.
        folder: has score.toml, and rescore.toml for all others, to be read for files that are not in this repository.
    """
    program, name, *arguments = words
    if program == "dask":
        return {"worker": dask_worker, "scheduler": dask_scheduler}[name].main.make_context(name, arguments).params
    run_toml = folder / ("score.toml" if name == "score" else "rescore.toml")
    filled: list[str] = []
    for word in arguments:
        if filled[-1:] == ["--config"] and not (ROOT / word).exists():
            word = str(run_toml)
        filled += ["--config", str(run_toml)] if word in ("…", "$@") else [re.sub(r"^\$[A-Z_]+$", "1", word)]
    return load_command(name).make_context(name, filled).params  # type: ignore[no-any-return]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A folder with the two run.toml that the docs show."""
    for name, page in (("score", "clusters.md"), ("rescore", "rescoring.md")):
        (text,) = re.findall(r"```toml\n(# run\.toml.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: path.name)
def test_its_commands_are_commands(path: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where they find deploy/ and examples/
    for words in commands(path):
        assert words[0] == "dask" or words[1] in COMMANDS, words
        try:
            parsed(words, settings)
        except Exception as error:  # noqa: BLE001 (typer's and click's alike: the message has to name the line)
            pytest.fail(f"{shlex.join(words)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_its_sentences_exist(path: Path) -> None:
    for name, more in re.findall(r"`(?:\.venv/bin/)?dynams +([a-z]+)([^`]*)`", path.read_text()):
        assert name in COMMANDS, name
        known = {flag for parameter in load_command(name).params for flag in parameter.opts} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", more)) <= known, more


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("dynams rescore --config run.toml --no-such x", "No such option"),
        ("dynams rescore --store runs/a --checkpoint", "requires an argument"),
        ("dynams rescore --config run.toml --workers many", "valid integer"),
        ("A=1 exec .venv/bin/dynams rescore --config run.toml ckpt/ > log", "unexpected extra argument"),
        ("dynams rescore --checkpoint ckpt/", "Missing option"),
        ("sbatch deploy/score.sbatch --no-such", "No such option"),
        ("srun dask worker --memory-limits 0", "check spelling"),
    ],
)
def test_the_check_can_fail(line: str, complaint: str, settings: Path) -> None:
    (words,) = shell_commands(line)
    with pytest.raises(Exception) as raised:
        parsed(words, settings)
    assert complaint in str(getattr(raised.value, "format_message", lambda: raised.value)())


def test_commands_are_found_in_every_kind_of_file() -> None:
    none = {path.name for path in FILES if not commands(path)}
    assert none == {"Dockerfile", "dynams-rescore.timer"}
    assert ["dask", "worker", "--nthreads", "1", "--memory-limit", "0"] in [
        words[:6] for words in commands(DEPLOY / "kubernetes.yaml")
    ]
    assert len(commands(ROOT / "docs" / "clusters.md")) >= 10


# ---- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: path.name)
def test_a_worker_s_memory_does_not_shrink_with_the_machine_s_cores(path: Path, settings: Path) -> None:
    """By default it is memory × threads / cores, and the nanny kills a worker that exceeds it."""
    for words in commands(path):
        if words[:2] == ["dask", "worker"]:
            given = parsed(words, settings)
            limits = {
                parse_memory_limit(given["memory_limit"], given["nthreads"], cores, logger=logging.getLogger())
                for cores in (1, 64)
            }
            assert len(limits) == 1, shlex.join(words)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_a_service_is_stopped_in_order(path: Path) -> None:
    service = units(path)["Service"]
    assert service["KillMode"] == "mixed"  # SIGTERM to the command alone: its workers finish their parts
    assert "143" in service["SuccessExitStatus"].split()
    assert int(service["TimeoutStopSec"]) >= 60


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.sbatch")), ids=lambda path: path.name)
def test_a_batch_job_is_stopped_in_order(path: Path) -> None:
    signals = re.findall(r"^#SBATCH --signal=(.*)", path.read_text(), re.MULTILINE)
    assert signals == ["B:TERM@120"]  # without B: every process of the job's steps gets it, and the script does not


def test_the_cron_job_retries_what_retrying_mends() -> None:
    _, job = yaml.safe_load_all((DEPLOY / "cronjob.yaml").read_text())
    spec = job["spec"]["jobTemplate"]["spec"]
    assert [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"]] == [[2]]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]  # workers are counted by the limit
    assert spec["activeDeadlineSeconds"] > 0


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: path.name)
def test_nothing_is_installed_from_where_it_is_not_published(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"pip install [^\n`]*\.\[([a-z0-9,]+)\]", text := path.read_text()):
        assert set(names.split(",")) <= set(extras), names
    assert "dynams-stream[" not in text
    assert "install dynams" not in text
