import errno
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diptych.testing as make
from diptych.cli import main
from diptych.data import index
from diptych.data.shards import list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych.testing import TinySample, tiny_sample
from diptych_data import entries, rewrite
from diptych_data.subset import MergeOptions, SubsetOptions, SubsetSummary, merge, subset


def content(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key → members of everything in a folder."""
    rows = [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row.members for row in rows}


def take(folder: Path, out: Path, **options: object) -> SubsetSummary:
    return subset(SubsetOptions(str(folder), out, **options))  # type: ignore[arg-type]


def test_members_are_the_same_bytes_in_the_same_order(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = take(shards, out, count=15, samples_per_shard=4)
    everything, chosen = content(shards), content(out)
    assert len(chosen) == summary.samples == 15
    assert summary.shards == 4
    assert [key for key in everything if key in chosen] == list(chosen)
    assert all(chosen[key] == everything[key] for key in chosen)
    assert all(list(chosen[key]) == list(everything[key]) for key in chosen)
    for shard in out.glob("*.tar"):
        assert index.read(shard) == index.scan(shard)
    assert json.loads((out / "subset.json").read_text())["summary"]["samples"] == 15


def test_the_draw_is_seeded_and_equal_input_gives_equal_bytes(shards: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        take(shards, tmp_path / name, count=12, seed=seed)
    first = (tmp_path / "a" / "000000.tar").read_bytes()
    assert (tmp_path / "b" / "000000.tar").read_bytes() == first
    assert (tmp_path / "c" / "000000.tar").read_bytes() != first


def test_first_fraction_and_shard_range(shards: Path, tmp_path: Path) -> None:
    keys = list(content(shards))
    take(shards, tmp_path / "first", count=12, pick="first")
    assert list(content(tmp_path / "first")) == keys[:12]
    assert take(shards, tmp_path / "tenth", fraction=0.1).samples == 4
    take(shards, tmp_path / "range", shard_range="1:4")
    assert list(content(tmp_path / "range")) == keys[10:30]
    assert take(shards, tmp_path / "both", shard_range="3:", count=5).samples == 5
    assert set(content(tmp_path / "both")) <= set(keys[17:])
    assert take(shards, tmp_path / "all", count=10**9).samples == 40


def test_a_list_of_keys(shards: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "keys.txt"
    wanted.write_text("s0031\ns0002\nnobody\n\ns0011\n")
    summary = take(shards, tmp_path / "out", keys=wanted)
    assert list(content(tmp_path / "out")) == ["s0002", "s0011", "s0031"]
    assert (summary.samples, summary.missing_keys) == (3, 1)
    wanted.write_text("nobody\n")
    with pytest.raises(DataError, match="no sample has one of the 1 keys"):
        take(shards, tmp_path / "none", keys=wanted)
    wanted.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"not readable.*keys\.txt"):
        take(shards, tmp_path / "none", keys=wanted)
    assert not (tmp_path / "none").exists()


def test_merge_makes_keys_unique_where_they_collide(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "a" / "0.tar", [tiny_sample("x", caption="1"), tiny_sample("y", caption="2")])
    make.write_shard(tmp_path / "b" / "0.tar", [tiny_sample("y", caption="3"), tiny_sample("2-y", caption="4")])
    make.write_shard(tmp_path / "c" / "0.tar", [tiny_sample("y", caption="5"), tiny_sample("z", caption="6")])
    summary = merge(MergeOptions(tuple(str(tmp_path / name) for name in "abc"), tmp_path / "out", samples_per_shard=4))
    texts = {key: members["txt"].decode() for key, members in content(tmp_path / "out").items()}
    assert texts == {"x": "1", "y": "2", "2-y": "3", "2-2-y": "4", "3-y": "5", "z": "6"}
    assert (summary.samples, summary.shards, summary.renamed) == (6, 2, 3)


def test_neighbours_with_one_key_do_not_become_one_sample(tmp_path: Path) -> None:
    """A shard of other hands: the same key twice, with other extensions."""
    picture = tiny_sample("a").members["png"]
    make.write_shard(tmp_path / "a" / "0.tar", [TinySample("a", {"png": picture, "txt": b"one"})])
    make.write_shard(tmp_path / "b" / "0.tar", [TinySample("a", {"webp": picture, "json": b"{}"})])
    merge(MergeOptions((str(tmp_path / "a"), str(tmp_path / "b")), tmp_path / "out"))
    assert {key: set(members) for key, members in content(tmp_path / "out").items()} == {
        "a": {"png", "txt"},
        "2-a": {"webp", "json"},
    }


def test_hostile_names_are_left_behind_and_counted(tmp_path: Path) -> None:
    keys = ["../../evil", "/abs", "a/../../b", "new\nline", "./fine", "folder/fine", "長い" * 60]
    make.write_shard(tmp_path / "in" / "0.tar", [tiny_sample(key) for key in keys])
    summary = take(tmp_path / "in", tmp_path / "out", fraction=1.0)
    assert set(content(tmp_path / "out")) == {"./fine", "folder/fine", "長い" * 60}
    assert summary.skipped == {"unsafe_key": 4}
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert not any(rewrite.is_unsafe(name) for name in tar.getnames())


def test_damaged_shards_give_what_they_have(tmp_path: Path) -> None:
    make.write_shards(tmp_path / "in", [3, 3], indexed=False)
    os.truncate(tmp_path / "in" / "000000.tar", 6000)
    summary = take(tmp_path / "in", tmp_path / "out", fraction=1.0)
    assert summary.skipped == {"truncated": 1}
    assert list(content(tmp_path / "out")) == ["s0000", "s0003", "s0004", "s0005"]


# --- nothing that is there is lost ---------------------------------------------------------------------------------


def test_an_output_that_is_there_stays_unless_it_may_be_replaced(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(shards, out, count=3)
    before = content(out)
    with pytest.raises(DataError, match="not empty"):
        take(shards, out, count=5)
    assert content(out) == before
    take(shards, out, count=5, overwrite=True)
    assert len(content(out)) == 5
    (out / "thesis.docx").write_text("years of work")
    with pytest.raises(DataError, match=r"other things than shards \(thesis\.docx\)"):
        take(shards, out, count=3, overwrite=True)
    assert (out / "thesis.docx").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("out", ["shards", "."])
def test_the_input_is_never_the_output(shards: Path, out: str) -> None:
    with pytest.raises(DataError, match="where the input lies"):
        take(shards, shards.parent / out, count=3, overwrite=True)
    assert len(content(shards)) == 40


def test_a_full_disk_leaves_all_as_it_was(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    take(shards, out, count=3)
    before = content(out)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DataError, match="No space left"):
            take(shards, out, count=5, overwrite=True)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_rename_that_fails_puts_back_what_was_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    take(shards, out, count=3)
    before = content(out)
    rename = Path.rename

    def fails_for_the_new_folder(path: Path, target: Path) -> Path:
        if path.name == ".out.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_for_the_new_folder)
        with pytest.raises(DataError, match="Input/output error"):
            take(shards, out, count=5, overwrite=True)
    assert content(out) == before


def test_a_kill_between_the_renames_is_mended(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(shards, out, count=3)
    before = content(out)
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half.tar").write_bytes(b"half")
    (tmp_path / "nothing").mkdir()
    make.write_shards(tmp_path / "nothing", [0])
    with pytest.raises(DataError, match="no sample to write"):
        take(tmp_path / "nothing", out, fraction=1.0, overwrite=True)
    assert content(out) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say what to take"),
        ({"count": 3, "fraction": 0.5}, "only one of count and fraction"),
        ({"count": 0}, "at least 1"),
        ({"fraction": 1.5}, r"\(0, 1\]"),
    ],
)
def test_options_that_do_not_fit(shards: Path, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take(shards, tmp_path / "out", **options)


@pytest.mark.parametrize("text", ["3", "a:b", "-1:2", "9:"])
def test_ranges_that_say_nothing(shards: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="shard_range"):
        take(shards, tmp_path / "out", shard_range=text)


def test_commands(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    assert main(["data", "subset", str(shards), str(out), "count=6", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 6
    both = ["data", "merge", str(shards), str(out), str(tmp_path / "both"), "--quiet"]
    assert main([*both, "samples_per_shard=20", "--overwrite"]) == 0
    assert "renamed: 6" in capsys.readouterr().out
    assert len(list((tmp_path / "both").glob("*.tar"))) == 3
    assert main([*both, "--overwrite", "samples_per_shard=23"]) == 0
    assert len(list((tmp_path / "both").glob("*.tar"))) == 2
    assert main(["data", "subset", str(shards), str(out), "cuont=6"]) == 2
    assert "did you mean 'count'?" in capsys.readouterr().err
    assert main(["data", "merge", str(shards), "--quiet"]) == 2
    assert "at least one set" in capsys.readouterr().err


def test_settings_of_merge_are_checked(shards: Path, tmp_path: Path) -> None:
    from diptych.cli.arguments import configured

    tree = {"sources": [str(shards)], "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="at least 1"):
        configured(MergeOptions, tree, ["samples_per_shard=0"], where="test")


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_positions_find_their_shards(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    positions = sorted(data.draw(st.sets(st.integers(0, total - 1))) if total else set())
    names = [f"{number}.tar" for number in range(len(counts))]
    flat = [(name, number) for name, size in zip(names, counts, strict=True) for number in range(size)]
    parts = entries.locate(names, counts, np.array(positions, np.int64))
    assert [(part.shard, number) for part in parts for number in part.numbers or ()] == [flat[p] for p in positions]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "2-a", "3-a", "2-2-a"]), max_size=8), max_size=4))
def test_new_keys_are_unique(sets: list[list[str]]) -> None:
    from diptych import log as logs

    chosen = rewrite._Chosen()
    rows = [[entries.Entry("0.tar", 0, key, {"txt": b"x"}) for key in one] for one in sets]
    found = [(key, entry.key) for key, entry in chosen.rows(rows, logs.Bar(None, None))]
    assert max(Counter(key for key, _ in found).values(), default=1) == 1
    assert [old for _, old in found] == [key for one in sets for key in one]
    assert chosen.renamed == sum(new != old for new, old in found)
