"""The command line, `bayestune`."""

from bayestune.cli.app import main as main
