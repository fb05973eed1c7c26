"""Unusable samples are passed over deterministically and counted; impossible settings are refused in one line."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.captions import CaptionConfig
from diptych.data.images import ImageConfig
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.sources import DataConfig, Source
from diptych.errors import ConfigError, DataError, DiptychError
from diptych.testing import TinySample, tiny_sample
from diptych_eval.reading import Batch


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


def test_broken_samples_are_counted_by_reason_and_skipped(tmp_path: Path, usable: Callable[[Path], Batch]) -> None:
    good = [tiny_sample(f"g{i}") for i in range(10)]
    make.write_shard(tmp_path / "000000.tar", [*good, *broken()])
    config = loader_config(tmp_path)
    with build_loader(config, feed(5)).batches() as batches:
        seen = list(islice(batches, 4))
    bad = {fault.reason for batch in seen for fault in batch.faults}
    assert {key for batch in seen for key in batch.keys} == {f"g{i}" for i in range(10)}
    assert bad == {"undecodable", "no_caption", "bad_caption", "no_picture"}
    assert {sample.key for sample in usable(tmp_path).items} >= {f"g{i}" for i in range(10)}


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


def test_what_stands_behind_a_single_shards_end_does_not_stop_the_run(tmp_path: Path) -> None:
    path = make.write_shard(tmp_path / "000000.tar", [tiny_sample(f"g{i}") for i in range(10)], indexed=False)
    path.write_bytes(path.read_bytes() + b"x" * 512)
    with build_loader(loader_config(tmp_path), feed(5)).batches() as batches:
        seen = list(islice(batches, 6))
    assert {fault.reason for batch in seen for fault in batch.faults} == {"trailing_data"}


def test_equal_keys_are_different_samples(tmp_path: Path) -> None:
    """In one shard, and in shards of one name in two folders."""
    for folder in ("a", "b"):
        samples = [TinySample("k", tiny_sample(f"{folder}{i}").members) for i in range(2)]
        make.write_shard(tmp_path / folder / "000.tar", samples)
    tree = {"shards": str(tmp_path / "{a,b}" / "000.tar"), "lanes": 1, "workers": 0, "cache_mib": 1}
    config = from_tree(DataConfig, tree | {"images": {"min_crop": 1.0}})
    with build_loader(config, feed(4)).batches() as batches:
        first, second = islice(batches, 2)
    for batch in (first, second):
        assert len(set(batch.sample_ids.tolist())) == 4
        assert len({tuple(image[:, 3, 3].tolist()) for image in batch.images}) == 4
    pictures = [{i: p.sum() for i, p in zip(b.sample_ids.tolist(), b.images, strict=True)} for b in (first, second)]
    assert pictures[0] == pictures[1]


def source(*shards: str) -> Source:
    return Source("", "", shards, 1, CaptionConfig(), ImageConfig())


def test_a_list_of_shards_is_known_wherever_it_lies() -> None:
    names = [f"{i:03d}.tar" for i in range(12)]
    here = source(*(f"/a/{name}" for name in names))
    assert here.digest == source(*(f"https://b.org/x/{name}?sign={i}" for i, name in enumerate(names))).digest
    assert here.digest == source(*(f"pipe:curl -s https://b.org/{name} -o /dev/stdout" for name in names)).digest
    assert here.digest != source(*(f"/a/{name}" for name in reversed(names))).digest
    assert here.digest != source(*(f"/a/{name}" for name in names[:-1])).digest
    assert source("/a/0.tar", "/b/0.tar").digest != source("/b/0.tar", "/a/0.tar").digest
    assert len(set(source("a", "aa", "aaa").labels.values())) == 3
    assert source("/a/only.tar").labels == {"/a/only.tar": ""}


def test_a_killed_worker_is_one_line(shards: Path) -> None:
    with build_loader(loader_config(shards, workers=1), feed(2)).batches() as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"a loader process was killed.*lower it"):
            list(islice(batches, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [{"name": "", "shards": "x"}]}, "needs a name"),
        ({"sources": [{"name": "a", "shards": "x", "weight": float("inf")}]}, "number from 0 on"),
        ({"sources": [{"name": "a", "shards": "x", "weight": float("nan")}]}, "number from 0 on"),
        ({"sources": [{"name": "a", "shards": "x", "lanes": 0}]}, "at least 1"),
        ({"shards": "x", "captions": {"views": [{"weight": float("nan")}]}}, "must be positive"),
        ({"shards": "x", "remote": {"timeout_seconds": float("inf")}}, "timeout_seconds"),
        ({"shards": "x", "remote": {"backoff_seconds": float("nan")}}, "backoff_seconds"),
        ({"shards": "/tmp/{0..3.tar"}, "not a pattern"),
        ({"shards": "/x/a**.tar"}, "not a pattern"),
    ],
)
def test_settings_without_meaning(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DiptychError, match=message):
        build_loader(from_tree(DataConfig, {"lanes": 1, "workers": 0} | changes), feed(1))
