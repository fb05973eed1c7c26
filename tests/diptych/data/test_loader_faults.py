"""Unusable samples are passed over deterministically and counted; impossible settings are refused in one line."""

from itertools import islice
from pathlib import Path

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.loader import DataConfig, Feed, build_loader, read_split
from diptych.errors import ConfigError, DataError, DiptychError
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
    bad: dict[str, int] = {}
    for batch in seen:
        for reason, count in batch.bad.items():
            bad[reason] = bad.get(reason, 0) + count
    assert {key for batch in seen for key in batch.keys} == {f"g{i}" for i in range(10)}
    assert bad.keys() == {"undecodable", "no_caption", "bad_caption", "no_picture"}
    assert {sample.key for sample in read_split(str(tmp_path), 16)} >= {f"g{i}" for i in range(10)}


def test_too_many_bad_samples_stop_the_run_with_the_worst_shard(tmp_path: Path) -> None:
    samples = [tiny_sample(f"g{i}") for i in range(30)] + broken()[:1]
    make.write_shard(tmp_path / "000000.tar", samples)
    config = loader_config(tmp_path, max_bad_fraction=0.01)
    with (
        build_loader(config, feed(30)).batches() as batches,
        pytest.raises(DataError, match=r"undecodable.*000000\.tar"),
    ):
        list(islice(batches, 60))


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


def test_a_stale_index_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make.write_shard(tmp_path / "000000.tar", [tiny_sample("a")])
    stale = (tmp_path / "000000.tar.index.json").read_text()
    make.write_shard(path, [tiny_sample("a"), tiny_sample("b" * 20), tiny_sample("c" * 99), *broken()])
    (tmp_path / "000000.tar.index.json").write_text(stale)
    assert build_loader(loader_config(tmp_path), feed(1)).num_samples == 9
    assert "stale index ignored" in caplog.text


def test_tokens_are_trimmed_to_the_longest_caption(shards: Path) -> None:
    with build_loader(loader_config(shards), feed(4)).batches() as batches:
        assert next(batches).tokens.shape == (4, 2)
