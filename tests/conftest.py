import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diptych.testing as make

torch.set_num_threads(1)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six shards, 40 samples, one shard empty."""
    return make.write_shards(tmp_path / "shards", [10, 7, 0, 13, 4, 6])


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """The command line sets handlers; no test inherits another's."""
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in ("diptych", "diptych_eval", "diptych_data")]
    handlers, levels = root.handlers[:], [logger.level for logger in (root, *ours)]
    yield
    root.handlers[:] = handlers
    for logger, level in zip((root, *ours), levels, strict=True):
        logger.setLevel(level)
