"""Writes the sidecar index of shards that came without."""

from pathlib import Path

from diptych import log as logs
from diptych.data import index
from diptych.data.stream import list_shards


def index_shards(folder: Path) -> list[Path]:
    """(Re)writes the index of every shard in `folder`; returns the shards.

    Raises:
        DataError: there are no shards, or one is no intact tar file.
    """
    shards = [Path(shard) for shard in list_shards(str(folder))]
    with logs.progress("indexing", len(shards)) as bar:
        for shard in shards:
            index.write(shard, index.scan(shard))
            bar.advance()
    return shards
