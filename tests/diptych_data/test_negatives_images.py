"""Counter-images: where they come from, and what a sample with them looks like."""

import json
from pathlib import Path

import pytest

import diptych.testing as make
from diptych.config import from_tree
from diptych.data import captions
from diptych.data.images import picture_extension
from diptych.data.shards import RawSample, list_shards, read_shard
from diptych.errors import DataError
from diptych.testing import tiny_sample
from diptych_data.negatives.make import NegativesSummary, negatives
from diptych_data.negatives.options import NegativesOptions

PICTURES = {"owl": tiny_sample("owl").members["png"], "fox": tiny_sample("fox").members["png"]}


def run(shards: Path, out: Path, **options: object) -> NegativesSummary:
    given = {"shards": str(shards), "out": str(out), "refine": None, "workers": 1}
    return negatives(from_tree(NegativesOptions, given | options))


def content(folder: Path) -> dict[str, RawSample]:
    return {sample.key: sample for shard in list_shards(str(folder)) for sample in read_shard(shard)}


def test_pictures_of_a_folder_lie_beside_the_pair(tmp_path: Path) -> None:
    samples = [tiny_sample(key, caption="an owl") for key in ("a", "b", "c")]
    make.write_shard(tmp_path / "in" / "000000.tar", samples)
    folder = tmp_path / "counter"
    (folder / "b").mkdir(parents=True)
    (folder / "a.PNG").write_bytes(PICTURES["owl"])
    (folder / "b" / "1.png").write_bytes(PICTURES["owl"])
    (folder / "b" / "2.jpg").write_bytes(PICTURES["fox"])
    (folder / "notes.txt").write_text("no picture")
    summary = run(tmp_path / "in", tmp_path / "out", images={"type": "folder", "path": str(folder)})
    found = content(tmp_path / "out")
    assert summary.images == 3
    assert found["a"].members["neg.png"] == PICTURES["owl"]
    assert (found["b"].members["neg.png"], found["b"].members["neg2.jpg"]) == (PICTURES["owl"], PICTURES["fox"])
    assert not any(name.startswith("neg") for name in found["c"].members)
    for old in samples:
        assert picture_extension(found[old.key].members) == "png"
        assert found[old.key].members["png"] == old.members["png"]


def test_a_picture_of_the_set_shows_the_negative(tmp_path: Path) -> None:
    texts = ["man cook", "woman cook", "zzz"]
    samples = [tiny_sample(f"s{n}", caption=text) for n, text in enumerate(texts)]
    make.write_shard(tmp_path / "in" / "000000.tar", samples)
    rules = [{"type": "replace"}]
    summary = run(tmp_path / "in", tmp_path / "out", images="shards", rules=rules, per_picture=30)
    found = content(tmp_path / "out")
    assert summary.images == 2
    for key, other, text in (("s0", "s1", "woman cook"), ("s1", "s0", "man cook")):
        (record,) = [one for one in json.loads(found[key].members["json"])["negatives"] if "image" in one]
        assert record["text"] == text
        assert found[key].members[record["image"]] == found[other].members["png"]
        assert text in captions.parse(found[key].members).texts("hard")


def test_workers_find_the_same_pictures(tmp_path: Path) -> None:
    for shard in range(3):
        samples = [tiny_sample(f"s{shard}{n}", caption=text) for n, text in enumerate(["man cook", "woman cook"] * 3)]
        make.write_shard(tmp_path / "in" / f"{shard:06d}.tar", samples)
    for number in (1, 2):
        run(tmp_path / "in", tmp_path / str(number), images="shards", workers=number)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "2"))
    assert one == two


def test_a_folder_without_pictures_is_one_line(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "in" / "000000.tar", [tiny_sample("a", caption="an owl")])
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "in", tmp_path / "out", images={"type": "folder", "path": str(tmp_path / "none")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in the folder"):
        run(tmp_path / "in", tmp_path / "out", images={"type": "folder", "path": str(tmp_path / "empty")})
