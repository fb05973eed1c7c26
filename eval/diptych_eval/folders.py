"""What was evaluated: folders of runs, or folders with a results.json, opened to be compared and shown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DataError
from diptych.runfolder import RunFolder
from diptych_eval import result
from diptych_eval.result import Result


@dataclass(frozen=True)
class Evaluated:
    """One model with what was measured of it."""

    name: str
    """As short as tells it from the others."""
    folder: Path
    """Holds results.json, items/ and exhibits/."""
    run: RunFolder | None
    """None for an evaluation of a model that is no run of ours."""
    results: tuple[Result, ...]

    def find(self, task: str, dataset: str) -> Result | None:
        """The result of one task on one set; None where it was not measured."""
        return next((one for one in self.results if (one.task, one.dataset) == (task, dataset)), None)


def open_folders(paths: Sequence[Path]) -> tuple[Evaluated, ...]:
    """Opens each; names are the folders' own, with as much of the path before them as tells them apart.

    Raises:
        DataError: one is neither a run nor an evaluation, or its results cannot be read.
    """
    opened = [_open(path) for path in paths]
    roots = [folder if run is None else run.root for folder, run in opened]
    return tuple(
        Evaluated(name, folder, run, tuple(result.read(folder / "results.json")))
        for name, (folder, run) in zip(_names(roots), opened, strict=True)
    )


def _open(path: Path) -> tuple[Path, RunFolder | None]:
    for run in (RunFolder(path), RunFolder(path.parent)):
        if run.exists and path in (run.root, run.evaluation):
            return run.evaluation, run
    if (path / "results.json").is_file():
        return path, None
    raise DataError(f"not a run (no config.yaml) and no evaluation (no results.json) · {path} · check the path")


def _names(roots: Sequence[Path]) -> list[str]:
    """The ends of the paths, lengthened until they differ; a folder given twice gets numbers."""
    parts = [root.resolve().parts for root in roots]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-length:]) for some in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return numbered
