"""What all commands share: the `--config` file, results on stdout, messages on stderr, exit codes.

0 success or nothing to do    1 work failed    2 wrong usage    3 another job holds the store
130 and 143 after a clean stop by Ctrl-C and SIGTERM
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from dynams_stream.errors import DynamsError, LeaseLostError, RoundExistsError, StoreBusyError, UsageError
from pipeline.own_python import import_from
from pipeline.stopping import Terminated

EXIT_FAILED, EXIT_USAGE, EXIT_BUSY = 1, 2, 3
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


# typer carries a click of its own and does not export the base of its errors.
_COMMAND_LINE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


# ---- the program -----------------------------------------------------------------------------------------------------


def run(app: typer.Typer | Callable[[], Any], arguments: list[str] | None = None, *, name: str) -> NoReturn:
    """Run a command and exit with the code of its outcome; errors are one message, a traceback only with `--debug`.

    Args:
        app: the command, or a function that loads it.
        arguments: the command line behind the command's name.
        name: what help and errors call the command.
    """
    # `--model my_models:resnet18` is looked for where the command runs, as `python -m` does.
    import_from(os.getcwd())
    signal.signal(signal.SIGTERM, _terminate)
    handler = RichHandler(console=stderr, show_path=False)
    # Its tracebacks would hide our message, and it sets its loggers' levels itself when it is imported.
    handler.addFilter(lambda record: not record.name.startswith("distributed."))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        command = typer.main.get_command(app) if isinstance(app, typer.Typer) else app()
        command.name = name.rsplit(" ", 1)[-1]
        outcome = command.main(args=given, prog_name=name, standalone_mode=False)
        if outcome == EXIT_INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(outcome if isinstance(outcome, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped; run the same command again to go on", EXIT_INTERRUPTED, debug)
    except Terminated:
        _fail("stopped by SIGTERM; run the same command again to go on", EXIT_TERMINATED, debug)
    except _COMMAND_LINE_ERROR as error:
        error.show(sys.stderr)
        sys.exit(EXIT_USAGE)
    except UsageError as error:
        _fail(str(error), EXIT_USAGE, debug)
    except (RoundExistsError, StoreBusyError, LeaseLostError) as error:
        _fail(str(error), EXIT_BUSY, debug)
    except DynamsError as error:
        _fail(str(error), EXIT_FAILED, debug)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error} ({type(error).__name__})", EXIT_FAILED, debug)
    except Exception as error:  # noqa: BLE001 - the last resort: people get a message, --debug the traceback
        _fail(f"{type(error).__name__}: {error} (--debug shows where it happened)", EXIT_FAILED, debug)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        stderr.print_exception(show_locals=False)
    stderr.print(Text.assemble(("error: " if code < 100 else "", "bold red"), message))
    sys.exit(code)


# ---- options ---------------------------------------------------------------------------------------------------------


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command's options; flags win over them."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    context.default_map = {**(context.default_map or {}), **_options(context, path, values)}
    return path


def _options(context: typer.Context, path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level keys that this command knows, and all keys of its own table, such as `[score]`."""
    own = values.get(context.command.name or "", {})
    if not isinstance(own, dict):
        raise UsageError(
            f"--config {path}: {context.command.name} has to be a table, [{context.command.name}]; got {own!r}"
        )
    known = {parameter.name for parameter in context.command.params}
    options = {}
    for key, value in {**values, **own}.items():
        name = key.replace("-", "_")
        if name in known:
            options[name] = json.dumps(value) if isinstance(value, dict) else value
        elif key in own or (not isinstance(value, dict) and not _is_option_elsewhere(name)):
            raise UsageError(
                f"--config {path}: {key!r} is not an option of `dynams {context.command.name}`; see --help"
            )
    return options


def _is_option_elsewhere(name: str) -> bool:
    """One file may serve several commands; a key that no command knows is a typing error."""
    from tools.cli import option_names

    return name in option_names()


def same_command(context: typer.Context, **changes: Any) -> list[str]:
    """The arguments that call this command again with the same values, `--config` read already, but for `changes`."""
    arguments = []
    for parameter in context.command.params:
        value = {**context.params, **changes}[parameter.name]
        if value is None or value is False or parameter.name == "config":
            continue
        arguments.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}")
    return arguments


StoreOption = Annotated[
    str, typer.Option("--store", help="Folder or object-store prefix that holds index and rounds, such as runs/a.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_load_config,
        is_eager=True,
        help="TOML file with values for these options, by their names; flags win over it.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes (or threads) to use; default: one per core.")
]
MaxErrorsOption = Annotated[
    int | None,
    typer.Option("--max-errors", min=0, help="Failed samples that are still accepted. Default: 1 %, at least 10."),
]
MaxBadShardsOption = Annotated[
    int,
    typer.Option(
        "--max-bad-shards", min=0, help="Shards that cannot be read and may be left out; the round is partial then."
    ),
]


# ---- output ----------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout: one JSON object, or words."""
    print(json.dumps(result) if as_json else text, flush=True)


def say(message: str) -> None:
    """Tell people something on stderr."""
    stderr.print(message, markup=False)
