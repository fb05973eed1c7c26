"""Sources in every batch by weight, for any ranks and workers, and resumed as if never stopped."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.batch import Batch, Cursors
from diptych.data.loader import build_loader
from diptych.data.mixture import Mixture, shares
from diptych.data.reader import Feed
from diptych.data.sources import DataConfig
from diptych.errors import ConfigError
from diptych.testing import tiny_sample

WEIGHTS = st.lists(st.floats(0, 10).map(lambda w: round(w, 3)), min_size=1, max_size=5).filter(any)


@given(
    weights=WEIGHTS,
    later=st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any),
    at=st.integers(1, 400),
    batch=st.integers(1, 90),
)
def test_every_batch_and_all_of_them_hold_the_shares(
    weights: list[float], later: list[int], at: int, batch: int
) -> None:
    later = later[: len(weights)] if any(later[: len(weights)]) else [1] * len(weights)
    mixture = Mixture(((0, shares(weights)), (at, shares(later))), seed=1)
    slot, drawn = 0, [0] * len(weights)
    while slot < 600:
        counts = mixture.draws(slot, batch, drawn)
        before, after = mixture.target(slot), mixture.target(slot + batch)
        assert sum(counts) == batch
        assert min(counts) >= 0
        assert all(abs(count - (end - start)) < 2 for count, start, end in zip(counts, before, after, strict=True))
        slot, drawn = slot + batch, [old + new for old, new in zip(drawn, counts, strict=True)]
        assert all(abs(have - wanted) < 1 for have, wanted in zip(drawn, after, strict=True))


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), slot=st.integers(0, 10**12))
def test_the_assignment_has_the_counts(counts: list[int], slot: int) -> None:
    of_slot = Mixture(((0, shares([1] * len(counts))),), seed=3).assign(slot, counts)
    assert np.bincount(of_slot, minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize("lanes", [8, 64, 128])
def test_a_source_visits_its_lanes_evenly(lanes: int) -> None:
    mixture = Mixture(((0, shares([0.3, 0.7])),), seed=5)
    slot, drawn, visits = 0, [0, 0], np.zeros(lanes)
    for _ in range(400):
        counts = mixture.draws(slot, 96, drawn)
        of_slot = mixture.assign(slot, counts)
        visits += np.bincount((slot + np.flatnonzero(of_slot == 0)) % lanes, minlength=lanes)
        slot, drawn = slot + 96, [old + new for old, new in zip(drawn, counts, strict=True)]
    # Throwing dice for every slot, the range over 64 lanes is about four times sqrt(mean).
    assert np.ptp(visits) <= 1.2 * np.sqrt(visits.mean())


def test_weights_are_exact() -> None:
    assert shares([0.1, 0.2]) == (Fraction(1, 3), Fraction(2, 3))


class Tokenizer:
    context_length = 4

    def __call__(self, texts: list[str]) -> Any:
        import torch

        return torch.tensor([[len(text), 9, 0, 0] for text in texts])


def feed(batch: int, rank: int = 0, world: int = 1) -> Feed:
    return Feed(batch, rank, world, seed=0, image_size=16, tokenizer=Tokenizer())


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Settings of two sources in shards of odd sizes."""
    for name, sizes in (("large", (9, 0, 14, 11, 8, 13)), ("small", (3, 5, 4, 2))):
        first = 0
        for number, size in enumerate(sizes):
            samples = [tiny_sample(f"{name}{first + i:03d}", caption=name) for i in range(size)]
            make.write_shard(tmp_path / name / f"{number:06d}.tar", samples)
            first += size
    sources = [
        {"name": "large", "shards": str(tmp_path / "large"), "weight": 3},
        {
            "name": "small",
            "shards": str(tmp_path / "small"),
            "weight": 1,
            "captions": {"views": [{"columns": ["name"]}]},
        },
    ]
    return {"sources": sources, "lanes": 4, "shuffle_window": 5, "workers": 0}


def take(tree: dict[str, Any], wanted: Feed, count: int, start: Cursors | None = None) -> list[Batch]:
    with build_loader(from_tree(DataConfig, tree), wanted).batches(start) as batches:
        return list(islice(batches, count))


def together(tree: dict[str, Any], *, world: int, count: int, start: Cursors | None = None) -> list[Any]:
    ranks = [take(tree, feed(12, rank, world), count, start) for rank in range(world)]
    assert all(len(batch.keys) == 12 // world for steps in ranks for batch in steps)
    return [
        (sorted(key for batch in step for key in batch.keys), Cursors.merge([batch.cursors for batch in step]))
        for step in zip(*ranks, strict=True)
    ]


def test_batches_hold_the_proportions_and_count_them(two: dict[str, Any]) -> None:
    two["weight_changes"] = [{"at_samples": 48, "weights": {"large": 1}}]
    batches = take(two, feed(12), 8)
    of = [Counter(key[:5] for key in batch.keys) for batch in batches]
    assert of == [Counter(large=9, small=3)] * 4 + [Counter(large=6, small=6)] * 4
    assert batches[-1].cursors.drawn == {"large": 60, "small": 36}


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 1)])
def test_mixed_batches_do_not_depend_on_ranks_and_workers(two: dict[str, Any], world: int, workers: int) -> None:
    two["weight_changes"] = [{"at_samples": 30, "weights": {"large": 1}}]
    expected = together(two, world=1, count=7)
    assert together(two | {"workers": workers}, world=world, count=7) == expected


def test_a_mixture_resumes_with_other_ranks(two: dict[str, Any]) -> None:
    two["weight_changes"] = [{"at_samples": 50, "weights": {"small": 7}}]
    unbroken = together(two, world=1, count=8)
    for stop in (1, 4, 5):
        saved = Cursors.from_json(unbroken[stop - 1][1].to_json())
        assert together(two, world=2, count=8 - stop, start=saved) == unbroken[stop:]


def test_each_source_goes_through_its_own_epochs(two: dict[str, Any]) -> None:
    keys = [key for batch in take(two, feed(12), 12) for key in batch.keys if key.startswith("small")]
    assert Counter(Counter(keys).values()) == Counter({2: 6, 3: 8}) or max(Counter(keys).values()) <= 4
    assert set(keys) == {f"small{i:03d}" for i in range(14)}


def test_sources_have_their_own_captions_and_crops(two: dict[str, Any]) -> None:
    two["captions"] = {"views": [{"columns": ["{language}_text"]}]}
    two["sources"][0] |= {"language": "zz", "captions": {"views": [{"columns": ["txt"]}]}}
    two["sources"][1] |= {"images": {"augment": {"invert": 1.0}}}
    plain = {
        key: image for batch in take(two, feed(12), 3) for key, image in zip(batch.keys, batch.images, strict=True)
    }
    del two["sources"][1]["images"]
    other = {
        key: image for batch in take(two, feed(12), 3) for key, image in zip(batch.keys, batch.images, strict=True)
    }
    assert plain.keys() == other.keys()
    for key, image in plain.items():
        assert image.equal(other[key]) == key.startswith("large")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": "x"}, "either shards or sources"),
        ({"sources": []}, "either shards or sources"),
        (
            {"weight_changes": [{"at_samples": 5, "weights": {"lrge": 1}}]},
            "name a source 'lrge'; there are: large, small",
        ),
        (
            {"weight_changes": [{"at_samples": 5, "weights": {"large": 0, "small": 0}}]},
            "no source has a positive weight",
        ),
        (
            {"weight_changes": [{"at_samples": 9, "weights": {}}, {"at_samples": 5, "weights": {}}]},
            "order of at_samples",
        ),
        ({"lanes": 5}, "exceeds the number of shards"),
    ],
)
def test_mixtures_without_meaning_are_refused(two: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take(two | changes, feed(12), 1)


def test_other_shards_are_not_resumed(two: dict[str, Any], tmp_path: Path) -> None:
    cursors = take(two, feed(12), 2)[-1].cursors
    (tmp_path / "large" / "000002.tar").unlink()
    with pytest.raises(ConfigError, match=r"began with other shards .6 then, 5 now"):
        take(two, feed(12), 1, cursors)
    two["sources"][0]["shards"] = str(tmp_path / "large" / "{000000..000005}.tar")
    two["max_bad_fraction"] = 0.5
    faults = [fault for batch in take(two, feed(12), 6, cursors) for fault in batch.faults]
    # Its sidecar is still there, so what is lost is known sample by sample.
    assert {(fault.reason, Path(fault.shard).name) for fault in faults} == {("unreadable", "000002.tar")}
    assert {fault.key for fault in faults} == {f"large{i:03d}" for i in range(9, 23)}
