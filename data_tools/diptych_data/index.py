"""Sidecar indexes of shards that came without, or whose shards have changed."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from diptych.data import index
from diptych.data.remote import is_remote
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych_data import parallel

State = Literal["fresh", "missing", "stale"]


@dataclass(frozen=True)
class IndexSummary:
    """What was found and done; of shards only the names of those that want attention."""

    shards: int
    fresh: int
    """Shards whose sidecar was right already."""
    written: int
    missing: tuple[str, ...] = ()
    """Shards that had no sidecar."""
    stale: tuple[str, ...] = ()
    """Shards whose sidecar was of another file, or unreadable."""
    damaged: tuple[tuple[str, str], ...] = ()
    """Shards that are no intact tar files, and what is wrong; what lies before the damage is indexed."""


def local_shards(pattern: str) -> tuple[str, ...]:
    """Shards that lie on a disk. Raises DataError where there are none, or for an address."""
    if is_remote(pattern):
        raise DataError(f"this tool reads local shards · {pattern} · copy them here first")
    return list_shards(pattern)


def write_indexes(pattern: str, *, overwrite: bool = False, workers: int | None = None) -> IndexSummary:
    """Writes the sidecars that are missing or stale, with `overwrite` all of them; an interrupted run goes on."""
    work = partial(_write, overwrite=overwrite)
    return _run(work, local_shards(pattern), "indexing", workers)


def check_indexes(pattern: str, *, workers: int | None = None) -> IndexSummary:
    """Says which sidecars are missing or stale; writes nothing."""
    return _run(_look, local_shards(pattern), "checking indexes", workers)


@dataclass(frozen=True)
class _Found:
    shard: str
    state: State
    written: bool
    fault: str


def _run(work: Callable[[str], "_Found"], shards: Sequence[str], title: str, workers: int | None) -> IndexSummary:
    found = list(parallel.each(work, shards, title=title, workers=workers))
    return IndexSummary(
        shards=len(found),
        fresh=sum(one.state == "fresh" for one in found),
        written=sum(one.written for one in found),
        missing=tuple(one.shard for one in found if one.state == "missing"),
        stale=tuple(one.shard for one in found if one.state == "stale"),
        damaged=tuple((one.shard, one.fault) for one in found if one.fault),
    )


def _look(shard: str) -> _Found:
    state, known = state_of(Path(shard))
    return _Found(shard, state, written=False, fault=known.fault if known is not None else "")


def _write(shard: str, *, overwrite: bool) -> _Found:
    found = _look(shard)
    if found.state == "fresh" and not overwrite:
        return found
    path = Path(shard)
    try:
        contents = index.scan(path)
        index.write(path, contents)
    except OSError as error:
        raise DataError(f"index not written ({error}) · {shard} · mend permissions or free space") from error
    return _Found(shard, found.state, written=True, fault=contents.fault)


def state_of(shard: Path) -> tuple[State, index.ShardIndex | None]:
    """Whether a shard's sidecar can be relied on, and what it says if so."""
    known = index.read(shard)
    if known is not None:
        return "fresh", known
    return ("stale" if os.path.lexists(index.sidecar(shard)) else "missing"), None
