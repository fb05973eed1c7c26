"""Features on the disk, by content: what model, of what pictures or texts, seen how. Safe to delete at any time.

FOLDER/
  sums.json                   checksums of files by path, size and time, so that no file is summed up twice
  KEY.safetensors             features [N, D]
  KEY.json                    what belongs to each of the N
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.runfolder import write_text

log = logging.getLogger(__name__)


class FeatureStore:
    """A folder of features.

    Args:
        afresh: whether what is there already is made again.
    """

    def __init__(self, folder: Path, *, afresh: bool = False) -> None:
        self._folder, self._afresh = folder, afresh
        self._sums_file = folder / "sums.json"
        self._sums: dict[str, str] = {}
        if self._sums_file.is_file():
            try:
                self._sums = json.loads(self._sums_file.read_text(encoding="utf-8"))
            except ValueError:
                log.warning("damaged list of checksums, made again · %s", self._sums_file)

    def digest(self, files: Iterable[str]) -> str:
        """A checksum of files' contents, of all files in folders; of what is no file here (URLs) the name."""
        known = len(self._sums)
        parts = [self._sum(path) for name in files for path in _inside(name)]
        if len(self._sums) != known:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._sums_file, json.dumps(self._sums))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _sum(self, name: str) -> str:
        path = Path(name)
        if not path.is_file():
            return name
        status = path.stat()
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if key not in self._sums:
            with path.open("rb") as file:
                self._sums[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sums[key]

    def load(self, key: str) -> tuple[Tensor, Any] | None:
        """What `save` was given under this key; None where there is nothing, or nothing intact."""
        tensors, notes = self._paths(key)
        if self._afresh or not tensors.is_file() or not notes.is_file():
            return None
        try:
            return load_file(tensors)["features"], json.loads(notes.read_text(encoding="utf-8"))
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            log.warning("damaged features, made again (%s) · %s", error, tensors)
            return None

    def save(self, key: str, features: Tensor, notes: Any) -> None:
        """Replaces both files, the features last: they are the sign that all is there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors, notes_file = self._paths(key)
        write_text(notes_file, json.dumps(notes, ensure_ascii=False))
        temporary = tensors.with_suffix(".tmp")
        save_file({"features": features.contiguous()}, temporary)
        temporary.replace(tensors)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self._folder / f"{key}.safetensors", self._folder / f"{key}.json"


def _inside(name: str) -> list[str]:
    path = Path(name)
    return sorted(str(file) for file in path.rglob("*") if file.is_file()) if path.is_dir() else [name]
