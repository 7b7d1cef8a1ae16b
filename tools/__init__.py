"""The command line: one file per command, gathered by `tools.cli`."""
