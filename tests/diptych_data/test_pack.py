"""Folders and tables become shards; bad input is one line and leaves nothing behind."""

import csv
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diptych.config import from_tree
from diptych.data import index
from diptych.errors import ConfigError, DataError
from diptych_data.index import write_indexes
from diptych_data.pack import PackOptions, PackSummary, pack
from diptych_eval.reading import Batch, Item
from diptych_eval.tasks.retrieval import Retrieval


def picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), colour).save(path)


def run(source: Path, out: Path, **options: object) -> PackSummary:
    return pack(from_tree(PackOptions, {"source": str(source), "out": str(out)} | options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        picture(tmp_path / "pictures" / f"p{number}.png", (number, 0, 0))
        (tmp_path / "pictures" / f"p{number}.txt").write_text(f"picture {number}\nsecond caption\n")
    return tmp_path / "pictures"


def table(path: Path, rows: list[dict[str, str]], header: list[str] | None = None) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header or list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_folder_with_captions_beside(folder: Path, tmp_path: Path, usable: Callable[[Path], Batch]) -> None:
    summary = run(folder, tmp_path / "out", samples_per_shard=2)
    assert summary == PackSummary(rows=5, samples=5, shards=3, skipped=0, out=str(tmp_path / "out"))
    found = usable(tmp_path / "out")
    assert [sample.captions["txt"] for sample in found.items] == [(f"picture {i}", "second caption") for i in range(5)]
    assert found.images[:, 0, 3, 3].tolist() == [0, 1, 2, 3, 4]


def test_a_folder_with_one_captions_file(folder: Path, tmp_path: Path, usable: Callable[[Path], Batch]) -> None:
    lines = tmp_path / "captions.txt"
    lines.write_text("".join(f"line {i}\n" for i in range(5)))
    run(folder, tmp_path / "out", captions_file=str(lines))
    assert [sample.captions["txt"] for sample in usable(tmp_path / "out").items][4] == ("line 4",)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_with_several_captions_and_labels(tmp_path: Path, suffix: str, usable: Callable[[Path], Batch]) -> None:
    picture(tmp_path / "a" / "x.png")
    rows = [{"image": "a/x.png", "name": "a hand, waving", "words": "bye | hello", "class": "3", "artist": "me"}]
    source = table(tmp_path / f"t{suffix}", rows)
    run(source, tmp_path / "out", captions=["name", "words"], separator=" | ", label="class")
    (sample,) = usable(tmp_path / "out").items
    assert sample.captions["name"] == ("a hand, waving",)
    assert sample.captions["words"] == ("bye", "hello")
    assert sample.labels == (3,)
    assert sample.meta == {"artist": "me", "file": "x.png"}


def test_the_benchmark_layout(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "names.txt").write_text("cat\n")
    source = table(tmp_path / "t.csv", [{"image": "x.png", "caption": "c", "label": "0"}])
    options = {"layout": "benchmark", "label": "label", "classes": str(tmp_path / "names.txt")}
    run(source, tmp_path / "out", **options)
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text() == "1\n"
    assert (tmp_path / "out" / "classnames.txt").read_text() == "cat\n"
    assert (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text() == "{c}\n"
    with tarfile.open(tmp_path / "out" / "test" / "0.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "cls", "json", "txt"}


def test_the_benchmark_layout_has_a_line_for_each_caption(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    rows = [{"image": "x.png", "name": "a fox", "words": "fox | red\u2028animal | a fox", "zh": ""}]
    source = table(tmp_path / "t.csv", rows)
    run(source, tmp_path / "out", layout="benchmark", captions=["name", "words", "zh"], separator=" | ")
    assert (tmp_path / "out" / "dataset_type.txt").read_text() == "retrieval\n"
    with tarfile.open(tmp_path / "out" / "test" / "0.tar") as tar:
        member = tar.extractfile("00000000.txt")
        assert member is not None
        assert member.read().decode() == "a fox\nfox\nred animal"
    task = from_tree(Retrieval, {"dataset": "d", "path": str(tmp_path / "out" / "test")})
    (entry,) = [task.pictures.read(number) for number in range(len(task.pictures))]
    item = Item(0, entry.key, entry.captions, entry.labels, entry.meta)
    assert task.captions_of([item]) == [("a fox", "fox", "red animal")]


def test_equal_input_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a")
    run(folder, tmp_path / "b")
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()


def break_table(tmp_path: Path, case: str) -> Path:
    picture(tmp_path / "x.png")
    row = {"image": "x.png", "caption": "c", "label": "1"}
    path = tmp_path / "t.csv"
    if case == "no column":
        return table(path, [{"image": "x.png", "captoin": "c"}])
    if case == "no rows":
        return table(path, [], ["image", "caption"])
    if case == "ragged":
        path.write_text("image,caption\nx.png,a,b\n")
        return path
    if case == "latin":
        path.write_bytes(b"image,caption\nx.png,caf\xe9\n")
        return path
    changes = {
        "no picture": {"image": "y.png"},
        "escape": {"image": "../x.png"},
        "empty": {"caption": ""},
        "label": {"label": "two"},
    }
    return table(path, [row, row | changes[case]])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no column", "no column 'caption'.*did you mean 'captoin'"),
        ("no rows", "no rows"),
        ("ragged", "row 2.*quote cells"),
        ("latin", "not UTF-8"),
        ("no picture", "no such picture.*row 3"),
        ("escape", "leaves the table's folder"),
        ("empty", "no caption in caption.*row 3"),
        ("label", "no class number.*row 3"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(break_table(tmp_path, case), tmp_path / "out", label="label" if case == "label" else None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or table"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="2 captions for 5 pictures"):
        run(folder, tmp_path / "out", captions_file=str(tmp_path / "few.txt"))
    (folder / "p3.txt").unlink()
    with pytest.raises(DataError, match=r"no caption for p3\.png"):
        run(folder, tmp_path / "out")


def test_an_unreadable_picture_stops_or_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "p2.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"unreadable picture.*p2\.png.*on_bad=skip"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", on_bad="skip").skipped == 1


def test_a_folder_with_something_in_it_is_left_alone_unless_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        run(folder, tmp_path / "out")
    (folder / "p2.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="unreadable"):
        run(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    picture(folder / "p2.png")
    run(folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "thesis.txt").exists()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes=FILE"):
        run(tmp_path, tmp_path / "out", layout="benchmark", label="label")


def test_index_writes_what_pack_wrote(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    tar = tmp_path / "out" / "000000.tar"
    before = index.sidecar(tar).read_bytes()
    index.sidecar(tar).unlink()
    write_indexes(str(tmp_path / "out"))
    assert index.sidecar(tar).read_bytes() == before
    written = index.read(tar)
    assert written is not None
    sample = written.samples[2]
    (text,) = [member for member in sample.members if member.extension == "txt"]
    assert tar.read_bytes()[text.offset : text.offset + text.size] == b"picture 2"
    assert sample.key == "00000002"
