import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import diptych.testing as make
from diptych.cli import main
from diptych.testing import TinySample
from diptych_data.counting import Repetitions, distribution, histogram
from diptych_data.scripts import letters, main_script
from diptych_data.stats import Stats, StatsOptions, stats
from diptych_data.tally import _MAX_COLUMNS, OTHER_COLUMNS


def picture(width: int, height: int, kind: str = "JPEG", *, rotated: bool = False) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (width, height), "teal").save(buffer, kind, **({"exif": exif} if rotated else {}))
    return buffer.getvalue()


def sample(key: str, *, picture: bytes | None = None, **columns: list[str]) -> TinySample:
    members = {"json": json.dumps({"captions": columns}).encode()}
    return TinySample(key, ({"jpg": picture} if picture is not None else {}) | members)


def count(folder: Path, **options: object) -> Stats:
    return stats(StatsOptions(str(folder), workers=1, **options))  # type: ignore[arg-type]


def test_counts(tmp_path: Path) -> None:
    wide, tall = picture(60, 20), picture(40, 30, rotated=True)
    rows = [
        sample("a", picture=wide, name=["a dog"], zh=["狗", "小狗"]),
        sample("b", picture=wide, name=["a dog"]),
        sample("c", picture=tall, name=["Ёлка стоит"]),
    ]
    make.write_shard(tmp_path / "0.tar", rows[:2])
    make.write_shard(tmp_path / "1.tar", rows[2:])
    found = count(tmp_path)
    assert (found.shards, found.samples, found.total_samples) == (2, 3, 3)
    assert found.shard_bytes == sum((tmp_path / name).stat().st_size for name in ("0.tar", "1.tar"))
    assert found.members["jpg"] == {"count": 3, "bytes": 2 * len(wide) + len(tall)}
    assert found.formats == {"JPEG": 3}
    assert found.modes == {"RGB": 3}
    assert found.width is not None
    assert (found.width.min, found.width.median, found.width.max) == (30, 60, 60)  # the tall one is rotated
    assert found.captions_per_sample is not None
    assert found.captions_per_sample.max == 3
    name, zh = found.columns["name"], found.columns["zh"]
    assert (name.samples, name.captions, name.repeated) == (3, 3, 1)
    assert name.captions_by_script == {"Latin": 2, "Cyrillic": 1}
    assert (zh.captions, zh.chars.max, zh.letters_by_script) == (2, 2, {"Han": 3})
    assert found.repeated_pictures == 1
    assert [(row.times, row.example) for row in found.most_repeated_pictures] == [(2, "a")]
    assert [(row.times, row.example, row.column) for row in found.most_repeated_captions] == [(2, "a dog", "name")]
    assert found.unusable == {}


def test_unusable_samples_are_counted_by_reason(tmp_path: Path) -> None:
    good = picture(8, 8)
    rows = [
        sample("ok", picture=good, name=["x"]),
        sample("blank", picture=good, name=["  "]),
        sample("none", name=["x"]),
        sample("html", picture=b"<!doctype html>", name=["x"]),
        TinySample("json", {"jpg": good, "json": b"{"}),
        TinySample("bomb", {"png": png_header(60_000, 60_000), "txt": b"x"}),
    ]
    make.write_shard(tmp_path / "0.tar", rows)
    shard = make.write_shard(tmp_path / "1.tar", rows[:3], indexed=False)
    os.truncate(shard, 3000)
    found = count(tmp_path)
    assert found.unusable["truncated"] == 1
    reasons = ("no_caption", "no_picture", "undecodable", "bad_caption", "too_large")
    assert [found.unusable[reason] for reason in reasons] == [1, 1, 1, 1, 1]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_million_columns_are_one(tmp_path: Path) -> None:
    rows = [sample(str(i), picture=picture(8, 8), **{f"c{i}": ["x"]}) for i in range(_MAX_COLUMNS + 5)]
    make.write_shard(tmp_path / "0.tar", rows[:60])
    make.write_shard(tmp_path / "1.tar", rows[60:])
    found = count(tmp_path)
    assert len(found.columns) == _MAX_COLUMNS + 1
    assert found.columns[OTHER_COLUMNS].captions == 5


def test_sampling_is_a_draw_of_the_given_size(shards: Path) -> None:
    found = count(shards, sample=12)
    assert (found.samples, found.total_samples) == (12, 40)
    assert count(shards, sample=12) == found
    assert count(shards, sample=12, seed=1).most_repeated_captions == ()
    assert count(shards, sample=1000) == count(shards)


def test_parts_add_up_however_they_are_read(shards: Path) -> None:
    assert stats(StatsOptions(str(shards), workers=2)) == count(shards)


def test_tokens_are_counted_with_the_tokenizer_that_comes(shards: Path) -> None:
    class Words:
        context_length = 9

        def __call__(self, texts: "list[str]") -> torch.Tensor:
            """One id for each word."""
            ids = [[1] * len(text.split()) for text in texts]
            return torch.tensor([row + [0] * (9 - len(row)) for row in ids])

    found = stats(StatsOptions(str(shards), workers=1), make_tokenizer=Words)
    tokens = found.columns["name"].tokens
    assert tokens is not None
    assert (tokens.min, tokens.max) == (3, 3)  # "caption of s0001"
    assert count(shards).columns["name"].tokens is None


def test_the_page_holds_no_foreign_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$\\frac{"
    rows = [sample(str(i), picture=picture(8 + i, 8), **{evil: [evil, "lone \ud800 half"]}) for i in range(2)]
    make.write_shard(tmp_path / "s" / "0.tar", rows)
    count(tmp_path / "s", out=tmp_path / "out")
    page = (tmp_path / "out" / "stats.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")  # names of SVG, nothing that is fetched
    assert page.count("<svg") >= 5
    document = json.loads((tmp_path / "out" / "stats.json").read_text(encoding="utf-8"))
    assert document["samples"] == 2


def test_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(shards), "--out", str(tmp_path / "out"), "--quiet", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "captions per sample" in shown
    assert "stats.html" in shown
    assert main(["data", "stats", str(shards), "--json", "--sample", "5", "--workers", "1", "--tokens"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 5
    assert document["columns"]["txt"]["tokens"]["min"] > 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_quantiles_are_numpys(values: list[int]) -> None:
    found = distribution(Counter(values))
    assert found is not None
    names = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    for name, share in names.items():
        assert getattr(found, name) == np.quantile(values, share, method="inverted_cdf"), name
    assert found.mean == pytest.approx(np.mean(values))  # another order of additions
    bins = np.linspace(0, 50, 11)
    assert histogram(Counter(values), bins).tolist() == np.histogram(values, bins)[0].tolist()


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5))
def test_repetitions_say_where_a_thing_is_first(parts: list[list[int]]) -> None:
    found = Repetitions([np.array(part, np.uint64) for part in parts])
    flat = [value for part in parts for value in part]
    counts = Counter(flat)
    assert found.repeated == len(flat) - len(counts)
    expected = {value: times for value, times in counts.items() if times > 1}
    got = {parts[part][place]: times for times, part, place in found.most(10)}
    assert got == expected
    for _, part, place in found.most(10):
        value = parts[part][place]
        assert all(value not in earlier for earlier in parts[:part])
        assert value not in parts[part][:place]


def test_scripts() -> None:
    assert letters("Ａbc, 漢字 123 😀") == {"Latin": 3, "Han": 2}
    assert letters("한글 ひらカナ ب") == {"Hangul": 2, "Hiragana": 2, "Katakana": 2, "Arabic": 1}
    assert main_script(letters("ab漢字")) == "Han"
    assert main_script(letters("123 😀")) == "none"


def test_a_tar_without_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    found = count(tmp_path, out=tmp_path / "out")
    assert (found.samples, found.width, found.columns) == (0, None, {})
    assert (tmp_path / "out" / "stats.html").is_file()
