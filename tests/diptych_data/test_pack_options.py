"""What users may ask of a pack: smaller pictures, mixed shards, their own keys; and what is refused for safety."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.config import from_tree
from diptych.data.images import decode
from diptych.data.shards import RawSample, list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych_data.pack import PackOptions, PackSummary, pack


def run(source: Path, out: Path, **options: object) -> PackSummary:
    return pack(from_tree(PackOptions, {"source": str(source), "out": str(out)} | options))


def samples(out: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(out)) for sample in read_shard(shard)]


def save(path: Path, size: tuple[int, int] = (9, 7), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (200, 100, 50, 128)[: len(mode)]).save(path, **options)
    return path


def table(path: Path, count: int, *, keys: list[str] | None = None) -> Path:
    """A table of `count` rows, all of the same picture."""
    save(path.parent / "x.png")
    keys = keys if keys is not None else [f"k{number}" for number in range(count)]
    path.write_text("image,caption,id\n" + "".join(f"x.png,c{n},{key}\n" for n, key in enumerate(keys)))
    return path


# --- pictures ----------------------------------------------------------------------------------------------------


def test_large_pictures_are_shrunk_and_small_ones_keep_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save(folder / "a.jpg", (400, 200), exif=_turned())
    save(folder / "b.png", (300, 30), "RGBA")
    small = save(folder / "c.png", (64, 64)).read_bytes()
    (folder / "captions.txt").write_text("a\nb\nc\n")
    run(folder, tmp_path / "out", max_side=64, captions_file=str(folder / "captions.txt"))
    first, second, third = samples(tmp_path / "out")
    assert decode(first.members["jpg"]).size == (32, 64)  # turned as EXIF says
    assert decode(second.members["webp"]).size == (64, 6)
    assert decode(second.members["webp"]).getpixel((5, 3))[3] == 128  # type: ignore[index]
    assert third.members["png"] == small


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_quality_decides_the_size(tmp_path: Path) -> None:
    Image.effect_noise((200, 200), 80).convert("RGB").save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("noise")
    sizes = []
    for quality in (30, 95):
        run(tmp_path, tmp_path / f"out{quality}", max_side=100, quality=quality, form="folder")
        (sample,) = samples(tmp_path / f"out{quality}")
        sizes.append(len(sample.members["jpg"]))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("name", "format", "extension"), [
    ("x", "JPEG", "jpg"), ("x.png", "WEBP", "webp"), ("x.JPEG", "JPEG", "jpg"), ("x.img", "BMP", "bmp"),
    ("x.jpg", "TIFF", "tif"), ("x.y.z", "GIF", "gif"),
])  # fmt: skip
def test_the_extension_is_told_by_the_bytes(tmp_path: Path, name: str, format: str, extension: str) -> None:
    save(tmp_path / name, format=format)
    (tmp_path / "t.csv").write_text(f"image,caption\n{name},c\n")
    run(tmp_path / "t.csv", tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample.members[extension] == (tmp_path / name).read_bytes()


def test_pictures_that_cannot_be_packed_are_counted_by_reason(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    save(tmp_path / "odd.ppm")
    (tmp_path / "html.jpg").write_bytes(b"<html>")
    with (tmp_path / "giant.jpg").open("wb") as file:
        file.truncate(1 << 30)  # takes no room on the disk; reading it whole would take a second and 1 GB
    (tmp_path / "huge.png").write_bytes(_bomb())
    names = ["good.png", "odd.ppm", "html.jpg", "giant.jpg", "huge.png", "gone.jpg", "../x.jpg", "html.jpg"]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},c\n" for name in names))
    summary = run(tmp_path / "t.csv", tmp_path / "out", on_bad="skip", samples_per_shard=3)
    reasons = {"bad_path": 1, "no_picture": 1, "too_large": 2, "undecodable": 2, "unsupported": 1}
    assert (summary.rows, summary.samples, summary.skipped, summary.skipped_by_reason) == (8, 1, 7, reasons)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["name"], line["reason"]) for line in lines] == [
        (1, "odd.ppm", "unsupported"),
        (2, "html.jpg", "undecodable"),
        (3, "giant.jpg", "too_large"),
        (4, "huge.png", "too_large"),
        (5, "gone.jpg", "no_picture"),
        (6, "../x.jpg", "bad_path"),
        (7, "html.jpg", "undecodable"),
    ]
    report = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert (report["rows"], report["samples"], report["skipped_by_reason"]) == (8, 1, reasons)
    assert report["options"]["on_bad"] == "skip"
    (tmp_path / "t.csv").write_text("image,caption\ngiant.jpg,c\n")
    with pytest.raises(DataError, match=r"too_large: 1073741824 bytes.*giant\.jpg"):
        run(tmp_path / "t.csv", tmp_path / "out2")


def _bomb() -> bytes:
    """A PNG that says it has ten thousand million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (100_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\ngone.png,c\n")
    with pytest.raises(DataError, match=r"not one readable picture \(1 no_picture\)"):
        run(tmp_path / "t.csv", tmp_path / "out", on_bad="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


# --- order, keys, roots ------------------------------------------------------------------------------------------


def test_shuffled_rows_are_all_there_in_another_order(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", 40)
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None)):
        run(source, tmp_path / name, shuffle_seed=seed, samples_per_shard=10)
        orders.append([sample.members["txt"] for sample in samples(tmp_path / name)])
    first, again, other, plain = orders
    assert first == again
    assert first != other
    assert plain == [f"c{number}".encode() for number in range(40)]
    assert sorted(first) == sorted(other) == sorted(plain)
    assert set(first[:10]) != set(plain[:10])
    assert [sample.key for sample in samples(tmp_path / "a")] == [f"{int(text[1:]):08d}" for text in first]


def test_keys_from_a_column(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", 3, keys=["a-1", "B_2", "3"])
    run(source, tmp_path / "out", key="id")
    assert [sample.key for sample in samples(tmp_path / "out")] == ["a-1", "B_2", "3"]
    assert json.loads(samples(tmp_path / "out")[0].members["json"])["meta"] == {"file": "x.png"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_key_that_is_there_twice(tmp_path: Path, suffix: str) -> None:
    source = table(tmp_path / "t.csv", 4, keys=["a", "b", "c", "b"])
    if suffix == "jsonl":
        lines = [json.dumps({"image": "x.png", "caption": "c", "id": key}) for key in "abcb"]
        source = tmp_path / "t.jsonl"
        source.write_text("\n".join(["", *lines]))  # lines count as an editor counts them, so 3 and 5 again
    with pytest.raises(DataError, match=rf"twice \(.*t\.{suffix}, \w+ 3; .*t\.{suffix}, \w+ 5\) · column id"):
        run(source, tmp_path / "out", key="id", on_bad="skip")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "ä", "a" * 81, "-" * 80 + " ", '"a\nb"'])
def test_keys_that_cannot_name_a_sample(tmp_path: Path, key: str) -> None:
    source = table(tmp_path / "t.csv", 2, keys=["good", key])
    with pytest.raises(DataError, match=r"cannot name a sample.*row 3") as caught:
        run(source, tmp_path / "out", key="id")
    assert "\n" not in str(caught.value)
    assert run(source, tmp_path / "out", key="id", on_bad="skip").skipped_by_reason == {"bad_key": 1}


def test_a_folder_has_no_keys(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png")
    with pytest.raises(DataError, match="no column for keys"):
        run(tmp_path / "in", tmp_path / "out", key="id")


def test_paths_start_from_image_root(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a" / "y.png")
    (tmp_path / "t.csv").write_text("image,caption\na/y.png,c\n")
    run(tmp_path / "t.csv", tmp_path / "out", image_root=str(tmp_path / "elsewhere"))
    assert len(samples(tmp_path / "out")) == 1
    (tmp_path / "t.csv").write_text("image,caption\n../elsewhere/a/y.png,c\n")
    with pytest.raises(DataError, match="leaves the table's folder"):
        run(tmp_path / "t.csv", tmp_path / "out2", image_root=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"max_side": 1}, "max_side must be at least 16"),
        ({"quality": 101}, "quality must lie between"),
        ({"captions": []}, "at least one column"),
        ({"samples_per_shard": 0}, "samples_per_shard must be at least 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, tmp_path / "out", **options)


# --- trust -------------------------------------------------------------------------------------------------------


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a", "b", "c"):
        save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}")
    secret = tmp_path / "secret"
    save(secret / "x.png")
    (secret / "x.txt").write_text("a secret")
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "inside.txt").symlink_to("a.txt")
    assert run(folder, tmp_path / "fine").samples == 4
    (folder / "link.png").symlink_to(secret / "x.png")
    with pytest.raises(DataError, match=r"link leads out of the folder.*link\.png"):
        run(folder, tmp_path / "out")
    (folder / "sub").symlink_to(secret)
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to(secret / "x.txt")
    summary = run(folder, tmp_path / "out", on_bad="skip")
    assert (summary.samples, summary.skipped_by_reason) == (3, {"link_outside": 3})
    assert all(b"secret" not in sample.members["txt"] for sample in samples(tmp_path / "out"))


def test_hidden_files_are_not_pictures(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png")
    (tmp_path / "in" / "x.txt").write_text("c")
    (tmp_path / "in" / "._x.png").write_bytes(b"what a Mac leaves behind")
    save(tmp_path / "in" / ".thumbnails" / "x.png")
    assert run(tmp_path / "in", tmp_path / "out").rows == 1


def test_folders_are_read_part_by_part(tmp_path: Path) -> None:
    for name in ("a/2", "a-b/1", "a/1", "b"):
        save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    run(tmp_path / "in", tmp_path / "out")
    assert [sample.members["txt"].decode() for sample in samples(tmp_path / "out")] == ["a/1", "a/2", "a-b/1", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"\xff", "not UTF-8"), (b" \n ", "caption file is empty"), (b"x" * (1 << 21), "caption file is too large")],
)
def test_bad_caption_files(tmp_path: Path, text: bytes, message: str) -> None:
    save(tmp_path / "in" / "x.png")
    (tmp_path / "in" / "x.txt").write_bytes(text)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "in", tmp_path / "out")


def test_an_empty_line_of_the_captions_file(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png")
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(DataError, match=r"caption is empty.*x\.png"):
        run(tmp_path / "in", tmp_path / "out", captions_file=str(tmp_path / "captions.txt"))


def test_an_output_folder_that_would_eat_its_input(tmp_path: Path) -> None:
    source = table(tmp_path / "data" / "t.csv", 1)
    with pytest.raises(DataError, match=r"output folder holds the input \(.*t\.csv\)"):
        run(source, tmp_path / "data", overwrite=True)
    assert source.is_file()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="output folder is a file"):
        run(source, tmp_path / "file", overwrite=True)


def test_a_quoted_cell_may_hold_line_ends(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", 0)
    source.write_text('\ufeffimage,caption\r\nx.png,"two\nlines, é"\r\n\r\nx.png,"a ""quote"""\r\n', encoding="utf-8")
    run(source, tmp_path / "out")
    assert [sample.members["txt"].decode() for sample in samples(tmp_path / "out")] == ["two\nlines, é", 'a "quote"']


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", 0)
    source.write_text('image,caption\nx.png,"' + "long\n" * 50_000)
    with pytest.raises(DataError, match="not readable as a table"):
        run(source, tmp_path / "out")
