"""The command line, `bayestune`."""

from bayestune_cli.app import main as main
