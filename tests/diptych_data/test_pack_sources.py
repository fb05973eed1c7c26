"""Every kind of source becomes the same shards; what is wrong with one is one line."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.config import from_tree
from diptych.data import index
from diptych.data.shards import RawSample, list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych.testing import tiny_sample, write_shard
from diptych_data.pack import PackOptions, PackSummary, pack
from diptych_data.readers.family import Columns, Row, open_source


def run(source: Path, out: Path, **options: object) -> PackSummary:
    return pack(from_tree(PackOptions, {"source": str(source), "out": str(out)} | options))


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def samples(out: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(out)) for sample in read_shard(shard)]


def captions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(sample.members["json"])["captions"] for sample in samples(out)]


def pictures(folder: Path, count: int) -> list[str]:
    (folder / "p").mkdir(parents=True)
    for number in range(count):
        (folder / "p" / f"{number}.png").write_bytes(picture(number))
    return [f"p/{number}.png" for number in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


# --- JSON lines --------------------------------------------------------------------------------------------------


def test_json_lines_with_one_caption_and_several(tmp_path: Path) -> None:
    names = pictures(tmp_path, 2)
    source = tmp_path / "t.jsonl"
    source.write_text(
        f'\ufeff{{"image": "{names[0]}", "caption": "a fox", "label": 3, "size": 1.5, "tags": ["a"], "none": null}}\n\n'
        f'{{"image": "{names[1]}", "caption": ["é | one", "two"], "label": null}}',
        encoding="utf-8",
    )
    run(source, tmp_path / "out", label="label", separator=" | ")
    first, second = samples(tmp_path / "out")
    document = {"captions": {"caption": ["a fox"]}, "meta": {"size": "1.5", "tags": '["a"]', "file": "0.png"}}
    assert json.loads(first.members["json"]) == document
    assert first.members["cls"] == b"3"
    assert json.loads(second.members["json"])["captions"] == {"caption": ["é", "one", "two"]}
    assert "cls" not in second.members


def test_a_folder_of_json_parts_is_read_in_order(tmp_path: Path) -> None:
    names = pictures(tmp_path / "parts", 4)
    for part in (1, 0):
        records = [{"image": names[i], "caption": f"c{i}"} for i in (2 * part, 2 * part + 1)]
        write_jsonl(tmp_path / "parts" / f"part-{part}.jsonl", records)
    run(tmp_path / "parts", tmp_path / "out", samples_per_shard=3)
    assert [sample.members["txt"] for sample in samples(tmp_path / "out")] == [b"c0", b"c1", b"c2", b"c3"]


GOOD = {"image": "p/0.png", "caption": "c", "label": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], r"not a JSON object · .*t\.jsonl, line 2"),
        (GOOD | {"caption": 5}, "neither a text nor a list of texts.*line 2"),
        (GOOD | {"caption": ["a", None]}, "neither a text nor a list of texts"),
        (GOOD | {"caption": []}, "no caption in caption.*line 2"),
        (GOOD | {"caption": "\ud800"}, "not Unicode"),
        (GOOD | {"caption": "x" * (1 << 20)}, "texts of 1048... bytes"),
        (GOOD | {"image": None}, "row has no picture"),
        (GOOD | {"image": "p/\0.png"}, "no such picture"),
        (GOOD | {"image": "x" * 5000}, "no such picture.*correct the path"),
        (GOOD | {"image": "a\nb\x1b[2J.png"}, r"no such picture \(a\?b\?\[2J\.png\)"),
        (GOOD | {"image": "https://e.org/x.png"}, "is an address"),
        (GOOD | {"label": True}, "no class number"),
        (GOOD | {"label": -1}, "no class number"),
        (GOOD | {"label": 1.5}, "no class number"),
    ],
)
def test_a_bad_line_stops_the_work_or_is_skipped(tmp_path: Path, record: Any, message: str) -> None:
    pictures(tmp_path, 1)
    source = write_jsonl(tmp_path / "t.jsonl", [GOOD, record])
    with pytest.raises(DataError, match=message) as caught:
        run(source, tmp_path / "out", label="label")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 500
    assert not list(tmp_path.glob(".out*"))
    summary = run(source, tmp_path / "out", on_bad="skip", label="label")
    assert (summary.rows, summary.samples, summary.skipped) == (2, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b'{"image": "x.png", "captoin": "c"}\n', "no column 'caption'.*did you mean 'captoin'"),
        (b'{"image": "x.png", "caption": "caf\xe9"}\n', "not UTF-8"),
        (b"{" + b" " * (1 << 24), "line longer than"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"1" * 5000 + b"\n", "not JSON"),
    ],
)
def test_bad_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "t.jsonl", tmp_path / "out")


# --- CSV ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=8), st.booleans())
def test_any_text_survives_a_table(tmp_path_factory: pytest.TempPathFactory, texts: list[str], windows: bool) -> None:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    (path.parent / "x.png").touch()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n" if windows else "\n", quoting=csv.QUOTE_ALL)
        writer.writerows([["image", "caption"], *(["x.png", f"<{text}>"] for text in texts)])
    rows = list(open_source(path, "auto", Columns()).part(np.arange(len(texts))[::-1]).rows())
    assert [row.captions["caption"] for row in rows if isinstance(row, Row)] == [(f"<{t}>",) for t in reversed(texts)]


# --- parquet -----------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_paths(tmp_path: Path) -> None:
    columns = {
        "image": pictures(tmp_path, 3),
        "caption": pa.array(["a", "b", "c"]).dictionary_encode(),
        "more": [["x", "y"], None, []],
        "label": pa.array([1, None, 3], pa.float64()),
        "raw": [b"1", b"2", b"3"],
        "when": pa.array([0, 1, 2], pa.timestamp("s")),
    }
    run(parquet(tmp_path / "t.parquet", columns), tmp_path / "out", captions=["caption", "more"], label="label")
    first, second, third = samples(tmp_path / "out")
    document = {"captions": {"caption": ["a"], "more": ["x", "y"]}, "meta": {"when": "1970-01-01 00:00:00"}}
    document["meta"] |= {"file": "0.png"}
    assert json.loads(first.members["json"]) == document
    assert (first.members["cls"], third.members["cls"], "cls" in second.members) == (b"1", b"3", False)


@pytest.mark.parametrize("form", ["struct", "binary", "large"])
def test_parquet_with_pictures_inside(tmp_path: Path, form: str) -> None:
    data = [picture(number) for number in range(5)]
    column: Any = {
        "struct": [{"bytes": item, "path": f"x/{number}.png"} for number, item in enumerate(data)],
        "binary": data,
        "large": pa.array(data, pa.large_binary()),
    }[form]
    source = parquet(tmp_path / "t.parquet", {"image": column, "caption": list("abcde")}, row_group_size=2)
    run(source, tmp_path / "out", samples_per_shard=2)
    written = samples(tmp_path / "out")
    assert [sample.members["png"] for sample in written] == data
    assert json.loads(written[3].members["json"])["meta"] == ({"file": "3.png"} if form == "struct" else {})


@pytest.mark.parametrize("order", ["source", "shuffled"])
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_parquet_gives_any_rows_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: Any, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any))
    count = sum(sizes)
    first = 0
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        columns = {
            "image": pa.array([b"."] * size, pa.binary()),
            "caption": pa.array([str(row) for row in rows], "str"),
        }
        parquet(folder / f"{number}.parquet", columns, row_group_size=data.draw(st.integers(1, 4)))
        first += size
    source = open_source(folder, "auto", Columns())
    (folder / "scratch").mkdir()
    source.prepare(folder / "scratch", order)
    numbers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    read = [row.captions["caption"] for row in source.part(np.array(numbers)).rows() if isinstance(row, Row)]
    assert read == [(str(number),) for number in numbers]
    assert source.num_rows == count


def test_large_row_groups_are_copied_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych_data.readers.parquet._MAX_GROUP_BYTES", 1000)
    rng = np.random.default_rng(0)
    texts = [rng.bytes(50).hex() for _ in range(200)]
    source = open_source(parquet(tmp_path / "t.parquet", {"image": [b"."] * 200, "caption": texts}), "auto", Columns())
    source.prepare(tmp_path, "source")
    assert (tmp_path / "rows-00000.arrow").is_file()
    (row,) = source.part(np.array([150])).rows()
    assert isinstance(row, Row)
    assert row.captions["caption"] == (texts[150],)
    assert row.where.endswith("t.parquet, row 151")


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no table at all")
    with pytest.raises(DataError, match="not readable as parquet") as caught:
        run(tmp_path / "t.parquet", tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'captions'"):
        run(parquet(tmp_path / "t.parquet", {"image": ["x"], "captions": ["c"]}), tmp_path / "out")
    with pytest.raises(DataError, match="no rows"):
        run(parquet(tmp_path / "t.parquet", {"image": [], "caption": []}), tmp_path / "out")
    wrong = parquet(tmp_path / "t.parquet", {"image": [b"<html>"], "caption": ["c"]})
    with pytest.raises(DataError, match=r"unreadable picture \(undecodable.*t\.parquet, row 1.*on_bad=skip"):
        run(wrong, tmp_path / "out")
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    with pytest.raises(DataError, match="row cannot be read"):
        run(parquet(tmp_path / "t.parquet", {"image": ["x"], "caption": text}), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r'pip install "diptych\[parquet\]"'):
        run(tmp_path / "t.parquet", tmp_path / "out")


# --- img2dataset -------------------------------------------------------------------------------------------------


def download(root: Path, form: str, *, shards: int = 2, each: int = 3) -> Path:
    """What img2dataset leaves: every third address failed, and is in the table alone."""
    root.mkdir()
    for shard in range(shards):
        name = f"{shard:05d}"
        rows = [(f"{name}{number:04d}", shard * each + number) for number in range(each)]
        status = ["success" if number % 3 != 1 else "failed_to_download" for _, number in rows]
        pq.write_table(pa.table({"key": [key for key, _ in rows], "status": status}), root / f"{name}.parquet")
        done = [row for row, state in zip(rows, status, strict=True) if state == "success"]
        (root / f"{name}_stats.json").write_text(json.dumps({"count": each, "successes": len(done)}))
        made = [tiny_sample(key, caption=f"caption {number}") for key, number in done]
        for sample, (key, number) in zip(made, done, strict=True):
            record = {"caption": f"caption {number}", "url": f"http://e.org/{number}", "key": key, "status": "success"}
            sample.members["json"] = json.dumps(record | {"alt": f"alt {number}", "error_message": None}).encode()
        if form == "webdataset":
            write_shard(root / f"{name}.tar", made, indexed=False)
        else:
            (root / name).mkdir()
            for sample in made:
                for extension, data in sample.members.items():
                    (root / name / f"{sample.key}.{extension}").write_bytes(data)
    return root


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_a_download_of_img2dataset(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diptych_data")
    source = download(tmp_path / "laion", form)
    summary = run(source, tmp_path / "out", captions=["caption", "alt"], key="key")
    assert (summary.rows, summary.samples) == (4, 4)
    assert "4 of 6 pictures" in caplog.text
    written = samples(tmp_path / "out")
    assert [sample.key for sample in written] == ["000000000", "000000002", "000010000", "000010002"]
    record = json.loads(written[1].members["json"])
    assert record["captions"] == {"caption": ["caption 2"], "alt": ["alt 2"]}
    assert record["meta"]["url"] == "http://e.org/2"
    assert written[1].members["png"] == tiny_sample("000000002").members["png"]


def test_one_tar_and_shards_of_ours_are_read_too(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "x.tar", [tiny_sample("a/s0", caption="one"), tiny_sample("a/s1", caption="two")])
    run(tar, tmp_path / "one")
    assert captions(tmp_path / "one") == [{"caption": ["one"]}, {"caption": ["two"]}]
    run(tar, tmp_path / "two", captions=["name"], key="key")
    assert captions(tmp_path / "two") == [{"name": ["one"]}, {"name": ["two"]}]
    assert [sample.key for sample in samples(tmp_path / "two")] == ["s0", "s1"]


def test_a_download_that_is_damaged(tmp_path: Path) -> None:
    source = download(tmp_path / "laion", "webdataset")
    tar = source / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"tar is damaged \(truncated\).*00001\.tar"):
        run(source, tmp_path / "out")
    summary = run(source, tmp_path / "out", on_bad="skip")
    assert (summary.samples, summary.skipped_by_reason) == (2, {"truncated": 1})
    with pytest.raises(DataError, match=r"only the download's own keys.*key=key"):
        run(source, tmp_path / "other", key="url")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": b"{}", "txt": b"x"}, "sample has no picture"),
        ({"png": picture(0), "json": b"{"}, "record is not JSON"),
        ({"png": picture(0), "json": b"[]"}, "not a JSON object"),
        ({"png": picture(0), "txt": b"\xff"}, "text not UTF-8"),
        ({"png": picture(0), "json": b'{"status": "failed_to_resize", "error_message": "e"}'}, "download failed"),
        ({"png": picture(0), "txt": b" "}, "no caption"),
        ({"png": picture(0), "txt": b"x" * (1 << 21)}, "sample of .* bytes"),
    ],
)
def test_bad_samples_of_a_download(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    sample = tiny_sample("bad")
    sample.members.clear()
    sample.members.update(members)
    tar = write_shard(tmp_path / "00000.tar", [tiny_sample("good"), sample])
    with pytest.raises(DataError, match=message):
        run(tar, tmp_path / "out")
    summary = run(tar, tmp_path / "out", on_bad="skip")
    assert (summary.samples, summary.skipped) == (1, 1)


# --- which reader ------------------------------------------------------------------------------------------------


def test_the_form_can_be_said(tmp_path: Path) -> None:
    names = pictures(tmp_path, 2)
    write_jsonl(tmp_path / "part.jsonl", [{"image": names[0], "caption": "from the table"}])
    (tmp_path / "p" / "0.txt").write_text("beside")
    (tmp_path / "p" / "1.txt").write_text("beside")
    run(tmp_path, tmp_path / "out1")
    assert captions(tmp_path / "out1") == [{"caption": ["from the table"]}]
    run(tmp_path, tmp_path / "out2", form="folder")
    assert captions(tmp_path / "out2") == [{"txt": ["beside"]}] * 2
    with pytest.raises(ConfigError, match=r"unknown form 'exel'.*folder, img2dataset, jsonl, parquet, table"):
        run(tmp_path, tmp_path / "out3", form="exel")
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(DataError, match="not a source that can be packed"):
        run(tmp_path / "t.xlsx", tmp_path / "out3")


def test_no_reader_leaves_an_index_beside_its_source(tmp_path: Path) -> None:
    source = download(tmp_path / "laion", "webdataset")
    before = sorted(source.iterdir())
    run(source, tmp_path / "out")
    assert sorted(source.iterdir()) == before
    assert not index.sidecar(source / "00000.tar").exists()
