"""The command line: commands and nothing else; each is a thin call into the library."""

from gambeson.cli.app import main

__all__ = ["main"]
