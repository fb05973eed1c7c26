"""One command of clip-benchmark in a process of its own.

This file needs the standard library, the peer's own packages and, of diptych, compat.py alone: it is run by the Python
of the peer's environment, with the command's arguments behind it. The last line it prints is the versions as JSON.
"""

import importlib
import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "open_clip_torch", "clip-benchmark", "webdataset")


def _repair_torchvision() -> Any:
    """Beside a CPU build of torch its import fails. To be kept: the repair ends with what is given back."""
    compat = runpy.run_path(str(Path(__file__).parents[1] / "compat.py"))  # by path: diptych is not installed here
    compat["install"]()
    return compat


if __name__ == "__main__":
    _kept = _repair_torchvision()
    importlib.import_module("clip_benchmark.cli").main()
    sys.stdout.write("\n" + json.dumps({package: version(package) for package in PACKAGES}) + "\n")
