"""Unusable samples are passed over deterministically and counted; impossible settings are refused in one line."""

from itertools import islice
from pathlib import Path

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.evaluation import read_split
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.sources import DataConfig
from diptych.errors import ConfigError, DiptychError
from diptych.testing import TinySample, tiny_sample


class Tokenizer:
    context_length = 4

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text) % 7 + 1, 9, 0, 0] for text in texts])


def loader_config(shards: Path, **changes: object) -> DataConfig:
    base = {"shards": str(shards), "lanes": 1, "shuffle_window": 8, "workers": 0}
    return from_tree(DataConfig, base | {"captions": {"views": [{"columns": ["txt"]}]}} | changes)


def feed(batch: int, world: int = 1) -> Feed:
    return Feed(batch, 0, world, 0, image_size=16, tokenizer=Tokenizer())


def broken() -> list[TinySample]:
    good = tiny_sample("good")
    return [
        TinySample("html", good.members | {"png": b"<html>not a picture</html>"}),
        TinySample("cut", good.members | {"png": good.members["png"][:40]}),
        TinySample("mute", {"png": good.members["png"]}),
        TinySample("blank", good.members | {"txt": b"  \n", "json": b"{}"}),
        TinySample("latin", good.members | {"txt": b"caf\xe9"}),
        TinySample("blind", {"txt": b"no picture"}),
    ]


def test_broken_samples_are_counted_by_reason_and_skipped(tmp_path: Path) -> None:
    good = [tiny_sample(f"g{i}") for i in range(10)]
    make.write_shard(tmp_path / "000000.tar", [*good, *broken()])
    config = loader_config(tmp_path)
    with build_loader(config, feed(5)).batches() as batches:
        seen = list(islice(batches, 4))
    bad = {fault.reason for batch in seen for fault in batch.faults}
    assert {key for batch in seen for key in batch.keys} == {f"g{i}" for i in range(10)}
    assert bad == {"undecodable", "no_caption", "bad_caption", "no_picture"}
    assert {sample.key for sample in read_split(str(tmp_path), 16)} >= {f"g{i}" for i in range(10)}


@pytest.mark.parametrize(
    ("changes", "batch", "world", "message"),
    [
        ({}, 50, 1, "larger than the data"),
        ({"lanes": 9}, 4, 1, "exceeds the number of shards"),
        ({"lanes": 3}, 4, 2, "no multiple of ranks"),
        ({"lanes": 3, "workers": 2}, 4, 1, "no multiple of ranks"),
        ({"lanes": 2}, 5, 2, "no multiple of the 2 ranks"),
    ],
)
def test_settings_that_do_not_fit(
    shards: Path, changes: dict[str, object], batch: int, world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loader(loader_config(shards, **changes), feed(batch, world))


@pytest.mark.parametrize("where", ["missing", "empty", "*.tar", "none-{000..002}.tar"])
def test_no_shards(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiptychError, match="diptych data pack"):
        build_loader(loader_config(tmp_path / where), feed(1))


def test_tokens_are_trimmed_to_the_longest_caption(shards: Path) -> None:
    with build_loader(loader_config(shards), feed(4)).batches() as batches:
        assert next(batches).tokens.shape == (4, 2)
