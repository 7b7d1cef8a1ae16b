"""Imports go one way, the public names are the ones that are listed, and the library loads no Dask."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynams_stream

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"dynams_stream": {"pipeline", "tools"}, "pipeline": {"tools"}, "tools": set()}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    modules = list((ROOT / package).glob("*.py"))
    assert modules
    for path in modules:
        assert not imported_roots(path) & FORBIDDEN[package], path


def test_every_public_name_is_there() -> None:
    for name in dynams_stream.__all__:
        assert getattr(dynams_stream, name).__doc__, name
    assert set(dynams_stream.__all__) == set(dynams_stream._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dynams_stream.nothing


def test_the_library_loads_no_dask_and_no_object_store_client() -> None:
    code = (
        "import sys, dynams_stream\n"
        "[getattr(dynams_stream, name) for name in dynams_stream.__all__]\n"
        "print([name for name in ('dask', 'distributed', 's3fs', 'matplotlib', 'typer') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_a_store_can_be_read_without_loading_torch() -> None:
    code = "import sys, dynams_stream; dynams_stream.Store('x'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["tools.status", "tools.index_shards", "tools.gc_rounds", "tools.verify_store"])
def test_commands_that_look_at_files_load_no_torch_and_no_scheduler(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'distributed') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_only_storage_opens_files() -> None:
    for path in (ROOT / "dynams_stream").glob("*.py"):
        if path.name == "storage.py":
            continue
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "open" not in calls, path
