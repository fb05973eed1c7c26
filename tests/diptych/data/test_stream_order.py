"""The order is exact: once per epoch, the same for any ranks and workers, and resumed as if never stopped."""

import tempfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diptych.testing as make
from diptych.data.batch import Batch, Cursors
from diptych.data.loader import build_loader
from diptych.data.order import LaneCursor, Share, deal
from diptych.data.reader import Feed
from diptych.data.shards import ShardStore, list_shards
from diptych.data.sources import DataConfig
from diptych.data.stream import LanePlan, lane_entries
from diptych.models.towers.open_clip import OpenClipTowers
from diptych.testing import TINY_MODEL


def tokenizer() -> object:
    towers = {key: value for key, value in TINY_MODEL["towers"].items() if key != "type"}
    return OpenClipTowers(**towers).build().tokenizer


TOKENIZER = tokenizer()


def feed(*, batch: int, rank: int = 0, world: int = 1, seed: int = 0) -> Feed:
    return Feed(batch, rank, world, seed, image_size=16, tokenizer=TOKENIZER)


def config(shards: Path, **changes: object) -> DataConfig:
    from diptych.config import from_tree

    base = {"shards": str(shards), "lanes": 4, "shuffle_window": 5, "workers": 0}
    views = {"views": [{"columns": ["name"]}]}
    return from_tree(DataConfig, base | {"captions": views} | changes)


def take(settings: DataConfig, wanted: Feed, count: int, start: Cursors | None = None) -> list[Batch]:
    with build_loader(settings, wanted).batches(start) as batches:
        return list(islice(batches, count))


def global_batches(settings: DataConfig, *, batch: int, world: int, count: int, start: Cursors | None = None) -> list:
    """Keys of each global batch over all ranks, and the cursors of all ranks after it."""
    ranks = [take(settings, feed(batch=batch, rank=rank, world=world), count, start) for rank in range(world)]
    return [
        (sorted(key for batch in step for key in batch.keys), Cursors.merge([batch.cursors for batch in step]))
        for step in zip(*ranks, strict=True)
    ]


def lane_keys(plan: LanePlan, start: LaneCursor, count: int) -> list[tuple[str, LaneCursor]]:
    return [(entry.read().key, cursor) for entry, cursor in islice(lane_entries(plan, start, ShardStore()), count)]


@given(
    sizes=st.lists(st.integers(0, 7), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) > 0),
    lanes=st.integers(1, 3),
    window=st.integers(1, 9),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_sample_once_per_epoch(sizes: list[int], lanes: int, window: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = list_shards(str(make.write_shards(Path(folder), sizes)))
        for epoch in range(2):
            keys: Counter[str] = Counter()
            for lane in range(lanes):
                plan = LanePlan(shards, lane, lanes, seed, window)
                size = sum(sizes[number] for number in deal(len(shards), lanes, seed=seed, epoch=epoch)[lane])
                keys.update(key for key, _ in lane_keys(plan, LaneCursor(epoch, 0), size))
            assert keys == Counter(f"s{i:04d}" for i in range(sum(sizes)))


@given(
    sizes=st.lists(st.integers(0, 6), min_size=2, max_size=4).filter(any),
    window=st.integers(1, 7),
    at=st.integers(0, 25),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_lane_resumed_anywhere_goes_on_as_if_never_stopped(
    sizes: list[int], window: int, at: int, indexed: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = list_shards(str(make.write_shards(Path(folder), sizes, indexed=indexed)))
        plan = LanePlan(shards, 0, 1, 7, window)
        unbroken = lane_keys(plan, LaneCursor(), 40)
        start = unbroken[at - 1][1] if at else LaneCursor()
        assert lane_keys(plan, start, 40 - at) == unbroken[at:]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_global_batches_do_not_depend_on_ranks_and_workers(tmp_path: Path, world: int, workers: int) -> None:
    settings = config(make.write_shards(tmp_path, [10, 7, 0, 13, 4, 6, 1, 9, 3, 5]), lanes=8)
    expected = global_batches(settings, batch=12, world=1, count=9)
    assert len({key for keys, _ in expected for key in keys}) == 58
    assert global_batches(replace(settings, workers=workers), batch=12, world=world, count=9) == expected


def test_resume_with_other_ranks_and_workers_continues_the_sequence(shards: Path) -> None:
    unbroken = global_batches(config(shards), batch=12, world=1, count=8)
    for stop in (1, 4, 6):
        saved = Cursors.from_json(unbroken[stop - 1][1].to_json())
        for world, workers in ((1, 0), (2, 1), (4, 0)):
            resumed = global_batches(
                config(shards, workers=workers), batch=12, world=world, count=8 - stop, start=saved
            )
            assert resumed == unbroken[stop:]


def test_pictures_and_captions_do_not_depend_on_workers_either(shards: Path) -> None:
    images = {"images": {"min_crop": 0.5, "augment": {"hue": 0.5, "rotate": 20, "erase": 0.5, "background": 1.0}}}
    alone = take(config(shards, **images), feed(batch=8), 3)
    helped = take(config(shards, workers=2, **images), feed(batch=8), 3)
    for one, two in zip(alone, helped, strict=True):
        assert one.keys == two.keys
        assert one.images.equal(two.images)
        assert one.tokens.equal(two.tokens)
        assert one.caption_ids.equal(two.caption_ids)


def test_a_cache_changes_nothing_but_the_time(shards: Path) -> None:
    augment = {"images": {"min_crop": 1.0, "augment": {"hue": 0.5}}}
    without = take(config(shards, **augment), feed(batch=20), 5)
    cached = take(config(shards, cache_mib=1, **augment), feed(batch=20), 5)
    assert all(one.images.equal(two.images) for one, two in zip(without, cached, strict=True))


def test_another_seed_another_order(shards: Path) -> None:
    first = take(config(shards), feed(batch=8, seed=0), 3)
    second = take(config(shards), feed(batch=8, seed=1), 3)
    assert [batch.keys for batch in first] != [batch.keys for batch in second]


@given(stride=st.integers(1, 6), start=st.integers(0, 50), length=st.integers(0, 30))
def test_shares_divide_the_slots(stride: int, start: int, length: int) -> None:
    slots = sorted(slot for offset in range(stride) for slot in Share(offset, stride).slots(start, start + length))
    assert slots == list(range(start, start + length))
