"""The command line; every command is a thin call into the library."""

from gambeson.cli.app import main

__all__ = ["main"]
