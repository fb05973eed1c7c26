import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch import Tensor

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.data.faults import UnusableSample
from diptych.data.images import EvaluationView
from diptych.data.shards import list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych.testing import TinySample
from diptych_data.dedup import DedupOptions, DedupSummary, dedup
from diptych_data.greedy import NO_EDGES, Edges, Places, choose
from diptych_data.nearest import close_pairs
from diptych_data.perceptual import fingerprint, near_pairs, num_bits


def scene(seed: int, side: int = 160) -> Image.Image:
    """Something with shapes in it: smooth noise in colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": quality} if kind != "PNG" else {}))
    return buffer.getvalue()


def sample(key: str, picture: Image.Image, kind: str = "PNG", quality: int = 90) -> TinySample:
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    return TinySample(key, {extension: encoded(picture, kind, quality), "txt": key.encode()})


def run(folder: Path, out: Path, **settings: object) -> DedupSummary:
    return dedup(from_tree(DedupOptions, {"shards": str(folder), "out": str(out), "workers": 1} | settings))


def keys(folder: Path) -> list[str]:
    return [row.key for shard in list_shards(str(folder)) for row in read_shard(shard)]


def duplicates(out: Path) -> dict[str, str]:
    with (out / "duplicates.csv").open(encoding="utf-8", newline="") as file:
        return {row["dropped"]: row["kept"] for row in csv.DictReader(file)}


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Four scenes; of the first a resized, a recompressed and a slightly brighter copy, of the second an exact one."""
    first = scene(0)
    make.write_shard(
        tmp_path / "in" / "0.tar",
        [
            sample("a-small", first.resize((90, 90))),
            sample("a", first),
            sample("b", scene(1)),
            sample("c", scene(2)),
        ],
    )
    make.write_shard(
        tmp_path / "in" / "1.tar",
        [
            sample("a-jpeg", first, "JPEG", 40),
            sample("b-copy", scene(1)),
            sample("a-bright", ImageEnhance.Brightness(first).enhance(1.04)),
            sample("d", scene(3)),
            sample("a-webp", first.resize((150, 150)), "WEBP", 60),
        ],
    )
    return tmp_path / "in"


def test_the_largest_of_each_kind_stays(copies: Path, tmp_path: Path) -> None:
    summary = run(copies, tmp_path / "out")
    assert keys(tmp_path / "out") == ["a", "b", "c", "d"]
    assert duplicates(tmp_path / "out") == {
        "a-small": "a",
        "a-jpeg": "a",
        "a-bright": "a",
        "a-webp": "a",
        "b-copy": "b",
    }
    assert (summary.samples, summary.kept, summary.duplicates, summary.by) == (9, 4, 5, {"hash": 5})
    assert json.loads((tmp_path / "out" / "dedup.json").read_text())["summary"]["duplicates"] == 5


def test_it_is_deterministic_whoever_reads(copies: Path, tmp_path: Path) -> None:
    run(copies, tmp_path / "one")
    run(copies, tmp_path / "two", workers=2)
    for name in ("000000.tar", "duplicates.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_dry_run_writes_nothing(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = ["data", "dedup", str(copies), str(tmp_path / "out"), "workers=1", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    assert "5 duplicates among 9 samples, 4 stay; nothing was written" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 1


def test_plain_pictures_are_told_apart_by_colour(tmp_path: Path) -> None:
    colours = {
        "red": (250, 0, 0),
        "dark": (120, 0, 0),
        "blue": (0, 0, 250),
        "red-too": (247, 3, 0),
        "white": (255,) * 3,
    }
    rows = [sample(name, Image.new("RGB", (40, 40), colour)) for name, colour in colours.items()]
    make.write_shard(tmp_path / "in" / "0.tar", rows)
    run(tmp_path / "in", tmp_path / "out")
    assert keys(tmp_path / "out") == ["red", "dark", "blue", "white"]
    run(tmp_path / "in", tmp_path / "loose", max_colour=255)
    assert keys(tmp_path / "loose") == ["red"]


def test_colours_at_the_edge_of_a_cell_are_compared_exactly(tmp_path: Path) -> None:
    """With max_colour=12 cells begin at 13, 26, …: neighbours over an edge are found, strangers beside them are not."""
    colours = {"a": (25, 0, 0), "b": (26, 0, 0), "c": (38, 0, 0), "d": (51, 0, 0)}
    rows = [sample(name, Image.new("RGB", (40, 40), colour)) for name, colour in colours.items()]
    make.write_shard(tmp_path / "in" / "0.tar", rows)
    run(tmp_path / "in", tmp_path / "out")
    assert keys(tmp_path / "out") == ["a", "c", "d"]  # c - a = 13, d - c = 13


def test_what_cannot_be_read_is_counted(copies: Path, tmp_path: Path) -> None:
    rows = [TinySample("html", {"jpg": b"<!doctype html>", "txt": b"x"}), TinySample("text", {"txt": b"x"})]
    make.write_shard(copies / "2.tar", rows)
    summary = run(copies, tmp_path / "out")
    assert summary.unusable == {"undecodable": 1, "no_picture": 1}
    assert summary.samples == 11 == summary.kept + summary.duplicates + 2
    for shard in copies.glob("[01].tar"):
        shard.unlink()
    with pytest.raises(DataError, match="not one readable picture"):
        run(copies, tmp_path / "none")


class Halves:
    """A model to which pictures are the same where their left halves are."""

    image_size = 16
    view = EvaluationView(16)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm pixels of the left half, their mean taken off."""
        half = images[:, :, :, :8].float().flatten(1)
        return torch.nn.functional.normalize(half - half.mean(1, keepdim=True), dim=1)

    def encode_text(self, texts: object) -> Tensor:
        """Not asked."""
        raise AssertionError


def test_a_model_finds_what_the_hash_does_not(tmp_path: Path) -> None:
    one, other = scene(0), scene(1)
    mixed = one.copy()
    mixed.paste(other.crop((80, 0, 160, 160)), (80, 0))
    make.write_shard(tmp_path / "in" / "0.tar", [sample("one", one), sample("mixed", mixed), sample("other", other)])
    options = {"shards": str(tmp_path / "in"), "model": "halves", "workers": 1}
    assert run(tmp_path / "in", tmp_path / "hash").duplicates == 0
    for radius in (4, None):
        out = tmp_path / f"model-{radius}"
        tree = options | {"out": str(out), "radius": radius, "min_cosine": 0.99}
        summary = dedup(from_tree(DedupOptions, tree), load=lambda _: Halves())
        assert keys(out) == ["one", "other"]
        assert summary.by == {"model": 1}
        assert summary.examples[0].distance == pytest.approx(0, abs=1e-2)  # the edge of the halves is blurred


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"radius": None}, "give a radius, a model"),
        ({"radius": 17}, r"radius must lie in \[0, 16\]"),
        ({"min_cosine": 0}, r"min_cosine must lie in \(0, 1\]"),
        ({"max_colour": -1}, r"max_colour must lie in \[0, 255\]"),
        ({"raduis": 3}, "did you mean 'radius'"),
    ],
)
def test_options_that_do_not_fit(tree: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_tree(DedupOptions, {"shards": "in", "out": "out"} | tree)


# --- the parts -----------------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_is_seen() -> None:
    first = fingerprint(encoded(scene(0)))
    assert first.pixels == 160 * 160
    assert fingerprint(encoded(scene(0, 320))).pixels == 320 * 320
    distances = [(first.hash ^ fingerprint(encoded(scene(seed))).hash).bit_count() for seed in range(1, 20)]
    assert min(distances) > 12  # of 64 random bits fewer than 13 differ once in a million times
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert fingerprint(encoded(clear)) == fingerprint(encoded(Image.new("RGB", (40, 40), "white")))
    for data in (b"", b"<!doctype html>", encoded(scene(0))[:300]):
        with pytest.raises(UnusableSample, match="undecodable"):
            fingerprint(data)


words = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 6), st.integers(0, 25))
def test_all_near_pairs_are_found_and_no_others(data: st.DataObject, radius: int, count: int) -> None:
    """Words that differ in a few bits from one another, among strangers."""
    seeds = data.draw(st.lists(words, min_size=1, max_size=3))
    bits = st.lists(st.integers(0, 63), max_size=radius + 2)
    hashes = []
    for _ in range(count):
        word = data.draw(st.sampled_from(seeds))
        for bit in data.draw(bits):
            word ^= 1 << bit
        hashes.append(word)
    found = {
        (int(i), int(j), int(d))
        for pairs in near_pairs(np.array(hashes, np.uint64), radius)
        for i, j, d in zip(pairs.first, pairs.second, pairs.distance, strict=True)
    }
    every = [(i, j, (hashes[i] ^ hashes[j]).bit_count()) for j in range(count) for i in range(j)]
    assert found == {pair for pair in every if pair[2] <= radius}


@given(st.lists(words, max_size=20))
def test_bits_are_counted(values: list[int]) -> None:
    assert num_bits(np.array(values, np.uint64)).tolist() == [value.bit_count() for value in values]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 11), st.floats(0.1, 1.0), st.integers(0, 5))
def test_blockwise_close_pairs_are_the_dense_ones(rows: int, block: int, limit: float, seed: int) -> None:
    features = torch.nn.functional.normalize(torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)), dim=1)
    found = {
        (i, j): cosine
        for first, second, cosines in close_pairs(features, limit, block=block)
        for i, j, cosine in zip(first.tolist(), second.tolist(), cosines.tolist(), strict=True)
    }
    dense = (features.double() @ features.double().T).tolist()
    for i in range(rows):
        for j in range(i + 1, rows):
            if abs(dense[i][j] - limit) > 1e-6:  # float32 decides such ties as it likes
                assert ((i, j) in found) == (dense[i][j] >= limit)
    assert all(i < j for i, j in found)


@given(st.integers(1, 12), st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11))), st.permutations(range(12)))
def test_whatever_goes_is_near_to_something_foremost_that_stays(
    count: int, pairs: set[tuple[int, int]], order: list[int]
) -> None:
    near = sorted({(min(p), max(p)) for p in pairs if p[0] != p[1] and max(p) < count})
    table = np.array(near, np.int64).reshape(-1, 2)
    edges = Edges(table[:, 0], table[:, 1], np.ones(len(table)))
    priority = np.array([place for place in order if place < count], np.int64)
    groups = np.arange(count)
    for by_hash, by_model in ((edges, NO_EDGES), (NO_EDGES, edges)):
        dropped = choose(Places(priority, groups, by_hash, by_model, alike=lambda *_: True))
        gone = {one.place for one in dropped}
        rank = {place: number for number, place in enumerate(priority.tolist())}
        assert not any(i not in gone and j not in gone for i, j in near)
        for one in dropped:
            assert one.kept not in gone
            assert (min(one.place, one.kept), max(one.place, one.kept)) in near
            assert rank[one.kept] < rank[one.place]
