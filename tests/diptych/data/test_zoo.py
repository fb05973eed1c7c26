"""A zoo of broken and hostile inputs: each has a defined outcome, none executes code, writes outside or ends a run."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.config import from_tree
from diptych.data.faults import FaultLog
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.shards import read_shard
from diptych.data.sources import DataConfig
from diptych_eval.reading import Batch

GOOD = ("good0", "good1")
Members = list[tuple[str, bytes]]


def picture(size: tuple[int, int] = (20, 16), kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = picture((64, 48))


def tar(members: Members, links: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
        for link in links:
            file.addfile(link)
    return buffer.getvalue()


def pair(key: str, image: bytes = PHOTO, text: bytes = b"a photo", extension: str = "jpg") -> Members:
    return [(f"{key}.{extension}", image), (f"{key}.txt", text)]


def among_good(*beasts: tuple[str, bytes], links: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    """A shard with the beast between two good samples."""
    return tar([*pair("good0"), *beasts, *pair("good1")], links)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size; its pixels are few zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims a size."""
    data = bytearray(PHOTO)
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (self._marker,))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


WHOLE = among_good(*pair("beast"))
DEEP = b"[" * 100_000
LISTS = json.dumps({"captions": {"txt": 5}}).encode()
DEVICE = tarfile.TarInfo("dev.jpg")
DEVICE.type = tarfile.CHRTYPE

# What the shard is, and what becomes of its beast: "" is read, otherwise the reason it is counted under.
ZOO: dict[str, tuple[bytes, str]] = {
    "truncated tar": (WHOLE[: WHOLE.index(b"good1.jpg") + 700], "truncated"),
    "tar without an end": (WHOLE[: WHOLE.index(b"good1.txt") + 512 + 512], "truncated"),
    "bad header": (WHOLE.replace(b"beast.jpg\0", b"b\xffast.jpg\0", 1), "broken_tar"),
    "not a tar": (b"<html><body>502 Bad Gateway</body></html>" * 40, "broken_tar"),
    "zero bytes": (b"", "broken_tar"),
    "compressed tar": (gzip.compress(WHOLE), "broken_tar"),
    "two tars in one": (WHOLE + tar(pair("lost")), "trailing_data"),
    "caption without its picture": (among_good(("beast.txt", b"no picture")), "no_picture"),
    "picture without its caption": (among_good(("beast.jpg", PHOTO)), "no_caption"),
    "picture of zero bytes": (among_good(*pair("beast", b"")), "undecodable"),
    "HTML saved as .jpg": (among_good(*pair("beast", b"<!doctype html><p>gone</p>")), "undecodable"),
    "truncated JPEG": (among_good(*pair("beast", PHOTO[: len(PHOTO) // 2])), "undecodable"),
    "truncated PNG": (among_good(*pair("beast", picture(kind="PNG")[:300], extension="png")), "undecodable"),
    "JPEG header alone": (among_good(*pair("beast", PHOTO[:30])), "undecodable"),
    "SVG": (among_good(*pair("beast", b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "undecodable"),
    "picture of 100 megapixels": (among_good(*pair("beast", jpeg_claiming(12000, 9000))), "too_large"),
    "decompression bomb": (among_good(*pair("beast", png_header(60000, 60000), extension="png")), "too_large"),
    "PNG that claims 2^31 pixels a side": (
        among_good(*pair("beast", png_header(2**31 - 1, 2**31 - 1), extension="png")),
        "too_large",
    ),
    "picture without pixels": (among_good(*pair("beast", png_header(0, 5), extension="png")), "undecodable"),
    "CMYK": (among_good(*pair("beast", picture(mode="CMYK"))), ""),
    "1x1": (among_good(*pair("beast", picture((1, 1)))), ""),
    "20000x1": (among_good(*pair("beast", picture((20000, 1)))), ""),
    "a GIF called .jpg": (among_good(*pair("beast", picture(kind="GIF"))), ""),
    "16 bits of grey": (among_good(*pair("beast", picture(kind="PNG", mode="I;16"), extension="png")), ""),
    "caption that is not UTF-8": (among_good(*pair("beast", text=b"caf\xe9")), "bad_caption"),
    "caption of a megabyte": (among_good(*pair("beast", text="wörd ".encode() * 200_000)), ""),
    "caption of control characters": (among_good(*pair("beast", text=b"\0\1\2\x1b\x7f\n")), "no_caption"),
    "caption with control characters": (among_good(*pair("beast", text=b"a\0\x1b[31m dog\x07")), ""),
    "caption of white space": (among_good(*pair("beast", text="\u2003\u00a0\n".encode())), "no_caption"),
    "JSON that is cut": (among_good(("beast.jpg", PHOTO), ("beast.json", b'{"caption": "a')), "bad_caption"),
    "JSON a hundred thousand deep": (among_good(("beast.jpg", PHOTO), ("beast.json", DEEP)), "bad_caption"),
    "JSON with a number for a caption": (among_good(("beast.jpg", PHOTO), ("beast.json", LISTS)), "no_caption"),
    "duplicate keys": (among_good(*pair("beast"), *pair("beast")), ""),
    "path traversal": (among_good(*pair("../../../../../tmp/beast")), ""),
    "absolute name": (among_good(*pair("/etc/beast")), ""),
    "symbolic link": (among_good(*pair("beast"), links=(link("evil.jpg", "/etc/passwd"),)), ""),
    "hard link": (among_good(*pair("beast"), links=(link("evil.jpg", "good0.jpg", tarfile.LNKTYPE),)), ""),
    "device": (among_good(*pair("beast"), links=(DEVICE,)), ""),
    "hidden file of a Mac": (among_good(*pair("beast"), ("._beast.jpg", b"\0\5\x16\7")), ""),
    "name that is not UTF-8": (WHOLE.replace(b"beast", b"\xff\xfeast"), "broken_tar"),
    "capital extension": (among_good(("beast.JPG", PHOTO), ("beast.TXT", b"loud")), ""),
    "member in a subfolder": (among_good(*pair("a.b/c/beast")), ""),
}


class Tokenizer:
    context_length = 4

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text) % 97 + 1, 9, 0, 0] for text in texts])


VIEWS = [{"columns": ["txt"]}, {"columns": ["caption"]}]


def stream(folder: Path, count: int, **changes: Any) -> tuple[set[str], FaultLog]:
    """Usable keys and faults of `count` batches of three."""
    tree = {"shards": str(folder), "lanes": 1, "shuffle_window": 50, "workers": 0, "max_bad_fraction": 1.0}
    config = from_tree(DataConfig, tree | {"captions": {"views": VIEWS}} | changes)
    faults, keys = FaultLog(), set()
    with build_loader(config, Feed(1, 0, 1, seed=0, image_size=16, tokenizer=Tokenizer())).batches() as batches:
        for batch in islice(batches, count):
            keys |= set(batch.keys)
            faults.add(len(batch.keys), batch.faults)
    return keys, faults


def test_there_are_enough_beasts() -> None:
    assert len(ZOO) >= 25


@pytest.mark.parametrize("beast", ZOO)
def test_outcome(beast: str, tmp_path: Path, usable: Callable[[Path], Batch]) -> None:
    data, reason = ZOO[beast]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "000000.tar").write_bytes(data)
    (folder / "000001.tar").write_bytes(tar(pair("other")))
    before = set(tmp_path.rglob("*"))
    keys, faults = stream(folder, 12)
    assert keys >= {"other"}
    assert faults.by_reason.keys() == ({reason} if reason else set())
    # Every place of an epoch but the beast's gives a sample, and all that can be read is read.
    assert keys == {raw.key for raw in read_shard(str(folder / "000000.tar"))} - _unusable(reason) | {"other"}
    assert {sample.key for sample in usable(folder).items} >= keys - {"beast"} - {"other"}
    assert set(tmp_path.rglob("*")) == before
    if reason not in ("broken_tar", "truncated"):
        assert keys >= set(GOOD)
    if not reason:
        assert any("beast" in key for key in keys)


def _unusable(reason: str) -> set[str]:
    return {"beast"} if reason not in ("", "truncated", "broken_tar", "trailing_data") else set()


def test_a_pickle_is_never_opened(tmp_path: Path, usable: Callable[[Path], Batch]) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(str(marker)))
    members = [(f"beast.{kind}", bomb) for kind in ("pkl", "pyd", "pickle", "pth", "npy", "cls")]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "000000.tar").write_bytes(among_good(*pair("beast"), *members))
    assert stream(folder, 6)[0] == {*GOOD, "beast"}
    assert {sample.key for sample in usable(folder).items} == set(GOOD)  # its label is no number
    assert not marker.exists()
    pickle.loads(bomb)  # the bomb is a real one
    assert marker.exists()


def test_the_whole_zoo_in_one_stream(tmp_path: Path) -> None:
    """What can be used comes in the same order for every reader, all else is counted under the same reasons."""
    for number, (data, _) in enumerate(ZOO.values()):
        (tmp_path / f"{number:06d}.tar").write_bytes(data)
    tree = {"shards": str(tmp_path), "lanes": 2, "shuffle_window": 7, "max_bad_fraction": 1.0}
    orders, counts = [], []
    for workers in (0, 2):
        config = from_tree(DataConfig, tree | {"captions": {"views": VIEWS}, "workers": workers})
        with build_loader(config, Feed(8, 0, 1, seed=0, image_size=16, tokenizer=Tokenizer())).batches() as batches:
            seen = list(islice(batches, 25))
        faults = FaultLog()
        for batch in seen:
            faults.add(len(batch.keys), batch.faults)
        orders.append([batch.keys for batch in seen])
        counts.append(faults.by_reason)
    assert orders[0] == orders[1]
    assert counts[0] == counts[1]
    assert counts[0].keys() == {reason for _, reason in ZOO.values() if reason}


def test_a_run_survives_the_zoo_and_tells_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diptych.testing import TINY_MODEL
    from diptych.train.loop import train
    from diptych.train.recipe import Recipe

    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (data, _) in enumerate(ZOO.values()):
        (folder / f"{number:06d}.tar").write_bytes(data)
    data = {"shards": str(folder), "lanes": 1, "workers": 0, "max_bad_fraction": 0.9, "captions": {"views": VIEWS}}
    tree = {
        "run": str(tmp_path / "run"),
        "total_samples": 160,
        "global_batch": 8,
        "model": TINY_MODEL,
        "data": data,
        "log": {"tensorboard": False, "every_steps": 5},
    }
    with caplog.at_level("INFO"):
        run = train(from_tree(Recipe, tree))
    counted = json.loads(run.faults.read_text())
    assert counted["by_reason"].keys() == {reason for _, reason in ZOO.values() if reason}
    assert sum(counted["by_reason"].values()) == counted["unusable"]
    assert counted["samples"] == 160 + counted["unusable"]
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    assert {name: value for name, value in last.items() if name.startswith("data/bad/")} == {
        f"data/bad/{reason}": count for reason, count in counted["by_reason"].items()
    }
    assert f"unusable={counted['unusable']} of {counted['samples']}" in caplog.text
