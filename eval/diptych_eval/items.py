"""Tables of items beside results.json: what the figures are means of, so that models can be compared row by row.

items/SLUG.npz: for each table `KIND|keys` and `KIND|COLUMN`, texts among the columns; where rows are not independent
`KIND|clusters`
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from diptych.errors import DataError
from diptych_eval.result import Result
from diptych_eval.tasks.family import Items


def slug(result: Result) -> str:
    """A file name for a task and its set."""
    return f"{result.task}-{re.sub(r'[^A-Za-z0-9_-]+', '-', result.dataset)}"


def write(folder: Path, result: Result, tables: tuple[Items, ...]) -> None:
    """Replaces the tables of one task."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for table in tables:
        arrays[f"{table.kind}|keys"] = np.array(table.keys, dtype=np.str_)
        arrays |= {f"{table.kind}|{name}": values.numpy() for name, values in table.columns.items()}
        texts = table.texts | ({"clusters": table.clusters} if table.clusters else {})
        arrays |= {f"{table.kind}|{name}": np.array(values, dtype=np.str_) for name, values in texts.items()}
    temporary = folder / f".{slug(result)}.tmp.npz"
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own flags
    temporary.replace(folder / f"{slug(result)}.npz")


def read(folder: Path, result: Result) -> tuple[Items, ...]:
    """The tables of one task; none where there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / f"{slug(result)}.npz"
    if not path.is_file():
        return ()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kinds = [name.removesuffix("|keys") for name in arrays if name.endswith("|keys")]
            return tuple(_table(arrays, kind) for kind in kinds)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"damaged table of items ({error}) · {path} · evaluate again with --overwrite") from error


def _table(arrays: "np.lib.npyio.NpzFile", kind: str) -> Items:
    found = {name.removeprefix(f"{kind}|"): arrays[name] for name in arrays if name.startswith(f"{kind}|")}
    texts = {name: tuple(values.tolist()) for name, values in found.items() if values.dtype.kind == "U"}
    columns = {name: torch.from_numpy(values) for name, values in found.items() if values.dtype.kind != "U"}
    return Items(kind, texts.pop("keys"), columns, texts.pop("clusters", ()), texts)
