"""What a task found, and the file that keeps it.

results.json: {"schema": 2, "results": [{
    "task": "zeroshot", "dataset": "openmoji/unseen",
    "model": "…",           checksum of weights, architecture and precision
    "fingerprint": "…",     of the model, the task's settings and its data: a repeat is noticed by it
    "metrics": {"top1": 0.31, …}, "intervals": {"top1": [0.25, 0.38]}, "num_items": 190,
    "protocol": {…the task's settings…}, "versions": {"diptych": "0.1.0", "torch": "2.13.0"}}]}
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diptych.errors import DataError
from diptych.runfolder import write_text

_SCHEMA = 2


@dataclass(frozen=True)
class Result:
    """The figures of one task on one data set."""

    task: str
    dataset: str
    metrics: dict[str, float]
    num_items: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% bootstrap intervals of some of the metrics."""
    protocol: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def write(path: Path, results: list[Result]) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": _SCHEMA, "results": [asdict(result) for result in results]}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> list[Result]:
    """The results in a file; none when it is not there.

    Raises:
        DataError: it is no results file of this version.
    """
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']}, this version reads {_SCHEMA}")
        return [
            Result(**(row | {"intervals": {name: (low, high) for name, (low, high) in row["intervals"].items()}}))
            for row in document["results"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a results file ({error}) · {path} · move it away and evaluate again") from error
