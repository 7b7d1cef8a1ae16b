"""`dynams`: gathers the commands. A command's module is imported when it is used, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any, NoReturn

import typer

from dynams_stream.errors import UsageError
from dynams_stream.version import library_version
from tools.command import run

COMMANDS = {
    "shard": ("tools.shard_dataset", "Write shards from a torchvision dataset or an image folder, and index them."),
    "index": ("tools.index_shards", "List the tar shards and write the index of their samples."),
    "score": ("tools.score_shards", "Score every sample with a checkpoint: one round's score tables."),
    "select": ("tools.select_subset", "Cut a selection from score tables and publish the round."),
    "rescore": ("tools.rescore", "Score and select when a new checkpoint appears, or once."),
    "status": ("tools.status", "What the store holds, and how old the newest round is."),
    "materialize": ("tools.materialize", "Write the selected samples as ordinary tar shards."),
    "gc": ("tools.gc_rounds", "Remove old rounds, and files that nothing names any more."),
    "verify": ("tools.verify_store", "Check every file of a store against its manifests."),
    "plan": ("tools.plan", "What a schedule costs, and whether the proxy pays, before anything is trained."),
    "train": ("tools.train", "The reference training run: DynaMS, baselines and full data, with a table."),
}

HELP = """\
Usage: dynams COMMAND [OPTIONS]

Train on the part of a huge WebDataset that matters now.

The data path:  shard → index → score → select → your training loop

Commands:
{commands}

First steps:
  dynams shard --dataset digits --out runs/digits
  dynams status --store runs/digits

dynams COMMAND --help tells a command's options; dynams --version the version.
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the `dynams` program."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items())
        print(HELP.format(commands=listing))
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        print(f"dynams {library_version()}")
        sys.exit(0)
    run(lambda: load_command(given[0]), given[1:], name=f"dynams {given[0]}")


def load_command(name: str) -> Any:
    """Import and build one command.

    Raises:
        UsageError: for a name that is no command; suggests the nearest.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {name!r}; {hint}")
    command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
    command.name = name
    return command


def option_names() -> set[str]:
    """The names of every command's options, for checking a shared configuration file."""
    return {parameter.name or "" for name in COMMANDS for parameter in load_command(name).params}


if __name__ == "__main__":
    main()
