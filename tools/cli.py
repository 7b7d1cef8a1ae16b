"""`dynams`: gathers the commands. A command's module is imported when it is used, so that `--help` answers at once."""

from __future__ import annotations

import importlib
from typing import Any

import click
import typer

from tools.command import run

COMMANDS = {
    "shard": ("tools.shard_dataset", "Write shards from a torchvision dataset or an image folder, and index them."),
    "index": ("tools.index_shards", "List the tar shards and write the index of their samples."),
    "score": ("tools.score_shards", "Score every sample with a checkpoint: one round's score tables."),
    "select": ("tools.select_subset", "Cut a selection from score tables and publish the round."),
    "rescore": ("tools.rescore", "Score and select when a new checkpoint appears, or once."),
    "status": ("tools.status", "What the store holds, and how old the newest round is."),
    "train": ("tools.train", "The reference training run: DynaMS, baselines and full data, with a table."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in the order of the data path."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name, or None."""
        return load_command(name) if name in COMMANDS else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def load_command(name: str) -> click.Command:
    """Import and build one command."""
    command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
    command.name = name
    return command


def option_names() -> set[str]:
    """The names of every command's options, for checking a shared configuration file."""
    return {parameter.name or "" for name in COMMANDS for parameter in load_command(name).params}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dynams-stream", prog_name="dynams")
def dynams(**options: Any) -> None:
    """Train on the part of a huge WebDataset that matters now.

    \b
    The data path:  shard → index → score → select → your training loop
    First steps:    dynams shard --dataset digits --out runs/digits
                    dynams status --store runs/digits
    """


def main() -> None:
    """Entry point of the `dynams` program."""
    run(dynams)


if __name__ == "__main__":
    main()
