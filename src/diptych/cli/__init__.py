"""The `diptych` command."""

from diptych.cli.program import main
from diptych.cli.program import parse as _parse

__all__ = ["_parse", "main"]
