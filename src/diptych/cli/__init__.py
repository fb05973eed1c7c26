"""The `diptych` command."""

from diptych.cli.program import main

__all__ = ["main"]
