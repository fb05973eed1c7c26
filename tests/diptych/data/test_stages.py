"""Stages are exact: the slot alone decides a batch's sizes, whoever reads it and wherever reading began."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.batch import Batch, Cursors
from diptych.data.loader import build_loader
from diptych.data.prepare import PixelCache
from diptych.data.reader import Feed
from diptych.data.shards import RawSample
from diptych.data.sources import DataConfig
from diptych.data.stages import Form, Stage, form_at
from diptych.data.tokens import shorten
from diptych.models.towers.open_clip import build_tokenizer

TOKENIZER = build_tokenizer({"context_length": 16})
STAGES = (Stage(16, image_size=8, context_length=4), Stage(30, image_size=12), Stage(40, context_length=5))
BATCH = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty samples in four shards, with hard captions longer than the right ones."""
    for shard in range(4):
        samples = [
            make.tiny_sample(f"s{shard}{number}", side=20, hard=["a much longer caption of another picture", "no"])
            for number in range(10)
        ]
        make.write_shard(tmp_path / "shards" / f"{shard:06d}.tar", samples)
    return tmp_path / "shards"


def config(folder: Path, **changes: object) -> DataConfig:
    views = [{"columns": ["name"]}]
    captions = {"views": views, "second_views": views, "hard": {"column": "hard", "count": 2}}
    tree = {"shards": str(folder), "lanes": 4, "shuffle_window": 5, "workers": 0, "captions": captions}
    return from_tree(DataConfig, tree | changes)


def take(
    settings: DataConfig,
    *,
    world: int = 1,
    count: int = 7,
    stages: Sequence[Stage] = STAGES,
    start: Cursors | None = None,
) -> list[list[Batch]]:
    """The parts of all ranks, batch by batch."""
    ranks = []
    for rank in range(world):
        feed = Feed(BATCH, rank, world, 0, image_size=16, tokenizer=TOKENIZER, stages=tuple(stages))
        with build_loader(settings, feed).batches(start) as batches:
            ranks.append(list(islice(batches, count)))
    return [list(parts) for parts in zip(*ranks, strict=True)]


def samples(parts: Sequence[Batch]) -> dict[str, tuple[object, ...]]:
    """Key → all that a batch holds of the sample; ids with their padding, for each rank trims its own."""

    def ids(tokens: torch.Tensor | None) -> list[int]:
        assert tokens is not None
        return torch.nn.functional.pad(tokens, (0, 16 - tokens.shape[-1])).flatten().tolist()

    found = {}
    for batch in parts:
        assert batch.second_tokens is not None
        for row, key in enumerate(batch.keys):
            tokens = [ids(each[row]) for each in (batch.tokens, batch.hard_tokens, batch.second_tokens)]
            found[key] = (batch.images[row].tolist(), *tokens)
    assert len(found) == BATCH
    return found


@pytest.mark.parametrize(
    ("slot", "form"),
    [
        (0, Form(8, 4)),
        (15, Form(8, 4)),
        (16, Form(12, 16)),
        (24, Form(12, 16)),  # a batch of 8 reaches beyond the stage in which it begins
        (30, Form(16, 5)),
        (40, Form(16, 16)),
        (10**9, Form(16, 16)),
    ],
)
def test_the_first_slot_of_a_batch_decides(slot: int, form: Form) -> None:
    assert form_at(slot, STAGES, Form(16, 16)) == form


def test_batches_have_the_sizes_of_their_stages(folder: Path) -> None:
    found = [batch for (batch,) in take(config(folder))]
    assert [batch.images.shape[-1] for batch in found] == [8, 8, 12, 12, 16, 16, 16]
    assert [batch.tokens.shape[1] for batch in found] == [4, 4, 9, 9, 5, 9, 9]
    end = TOKENIZER([""])[0, 1]
    for batch in found:
        assert batch.second_tokens is not None
        for tokens in (batch.tokens, batch.hard_tokens, batch.second_tokens):
            assert bool((tokens == end).any(-1).all())  # nothing loses its end-of-text token


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_ranks_and_workers(folder: Path, world: int, workers: int) -> None:
    expected = [samples(parts) for parts in take(config(folder))]
    assert [samples(parts) for parts in take(config(folder, workers=workers), world=world)] == expected


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_resume_in_any_stage_goes_on_as_if_never_stopped(folder: Path, stop: int) -> None:
    unbroken = take(config(folder))
    saved = Cursors.from_json(unbroken[stop - 1][0].cursors.to_json())
    resumed = take(config(folder, workers=2), start=saved, count=7 - stop)
    assert [samples(parts) for parts in resumed] == [samples(parts) for parts in unbroken[stop:]]


def test_stages_change_neither_order_nor_captions_nor_what_follows_them(folder: Path) -> None:
    staged, plain = take(config(folder)), take(config(folder), stages=())
    assert [parts[0].keys for parts in staged] == [parts[0].keys for parts in plain]
    assert all(a[0].caption_ids.equal(b[0].caption_ids) for a, b in zip(staged, plain, strict=True))
    assert samples(staged[-1]) == samples(plain[-1])


def test_a_cache_changes_nothing_in_any_stage(folder: Path) -> None:
    whole = {"images": {"min_crop": 1.0}}
    twice = (Stage(80, image_size=8), Stage(160, image_size=12))  # every epoch has forty samples
    without = take(config(folder, **whole), stages=twice, count=25)
    cached = take(config(folder, cache_mib=1, **whole), stages=twice, count=25)
    assert [samples(parts) for parts in cached] == [samples(parts) for parts in without]


def test_a_new_size_has_the_whole_cache_for_itself() -> None:
    raws = [RawSample(str(number), {}, "shard", number) for number in range(3)]
    small, large = torch.zeros(3, 4, 4).byte().numpy(), torch.zeros(3, 8, 8).byte().numpy()
    cache = PixelCache(2 * large.nbytes)
    for raw in raws:
        cache.put(raw, small)
    assert cache.get(raws[0], 4) is not None
    assert cache.get(raws[0], 8) is None
    for raw in raws:
        cache.put(raw, large)
    assert [cache.get(raw, 8) is not None for raw in raws] == [True, True, False]
    assert cache.get(raws[0], 4) is None


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 15, 16])
def test_shortened_ids_are_those_of_a_tokenizer_of_that_length(length: int) -> None:
    captions = [
        "",
        "cat",
        "a cat",
        "a != b and c != d",
        "one two three four five six seven eight nine ten eleven",
    ]
    captions += [" ".join(["word"] * count) for count in range(length - 3, length + 2)]
    tokens = TOKENIZER(captions)
    assert tokens[3].tolist().index(0) < tokens[3].argmax()  # an id that looks like padding, within a caption
    assert shorten(tokens, length).equal(build_tokenizer({"context_length": length})(captions))


def test_ids_without_an_end_keep_their_last() -> None:
    tokens = torch.tensor([[7, 8, 9, 0, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0], [5, 6, 7, 8, 9]])
    assert shorten(tokens, 2).tolist() == [[7, 9], [7, 0], [0, 0], [5, 9]]
    assert shorten(tokens, 3).tolist() == [[7, 8, 9], [7, 0, 0], [0, 0, 0], [5, 6, 9]]
    assert tokens[0].tolist() == [7, 8, 9, 0, 0]
    assert shorten(tokens[:0], 2).shape == (0, 2)
