import html.parser
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

import diptych.testing as make
from diptych.cli import main
from diptych.testing import TinySample, tiny_sample
from diptych_data.view import ViewOptions, view


class Tags(html.parser.HTMLParser):
    """Every tag and attribute that a browser would see, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def sheet(folder: Path, out: Path, **options: object) -> str:
    view(ViewOptions(str(folder), out, workers=1, **options))  # type: ignore[arg-type]
    return out.read_text(encoding="utf-8")


def test_cards_show_what_is_said(tmp_path: Path) -> None:
    document = {"captions": {"name": ["a dog"], "zh": ["狗", "小狗"], "many": [f"t{i}" for i in range(20)]}}
    members = {"png": tiny_sample("a", side=40).members["png"], "json": json.dumps(document).encode(), "cls": b"7"}
    make.write_shard(tmp_path / "s" / "0.tar", [TinySample("folder/a", members)])
    page = Tags(sheet(tmp_path / "s", tmp_path / "sheet.html"))
    for text in ("folder/a", "0.tar", "40 × 40 · PNG RGB", "class 7", "a dog", "小狗", "and 8 more"):
        assert text in page.text, text
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (picture["src"] or "").startswith("data:image/webp;base64,")


def test_thumbnails_are_small_and_keep_their_shape(tmp_path: Path) -> None:
    import base64

    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((900, 300)).save(buffer, "PNG")
    make.write_shard(tmp_path / "s" / "0.tar", [TinySample("a", {"png": buffer.getvalue(), "txt": b"x"})])
    page = sheet(tmp_path / "s", tmp_path / "sheet.html", side=120)
    data = re.findall(r"data:image/webp;base64,([^\"]+)", page)[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert thumbnail.size == (120, 40)


def test_the_draw_is_seeded(shards: Path, tmp_path: Path) -> None:
    first = sheet(shards, tmp_path / "a.html", count=7)
    assert first.count("<article") == 7
    assert sheet(shards, tmp_path / "b.html", count=7) == first
    assert sheet(shards, tmp_path / "c.html", count=7, seed=1) != first
    assert sheet(shards, tmp_path / "d.html", count=500).count("<article") == 40


EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--><svg/onload=alert(1)>",
    "{{ 7 * 7 }}{% include 'frame.html.j2' %}",
    "\x00\x07 lone \ud800 half",
    "x" * 3_000_000,
)


def test_hostile_samples_are_text(tmp_path: Path) -> None:
    picture = tiny_sample("a").members["png"]
    rows = [
        TinySample(f"k{i}", {"png": picture, "json": json.dumps({"captions": {text[:50]: [text]}}).encode()})
        for i, text in enumerate(EVIL)
    ]
    rows.append(TinySample("<b onclick=alert(1)>&amp;", {"png": picture, "txt": b"x", "cls": b"<i>\xff"}))
    make.write_shard(tmp_path / "s" / "0.tar", rows)
    page = sheet(tmp_path / "s", tmp_path / "sheet.html")
    found = Tags(page)
    assert not {tag for tag, _ in found.tags} & {"script", "svg", "iframe", "b", "i", "form", "object"}
    assert all(not name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert [attributes["src"][:5] for tag, attributes in found.tags if tag == "img"] == ["data:"] * len(rows)  # type: ignore[index]
    assert "{{ 7 * 7 }}" in found.text
    assert "(3,000,000 characters)" in found.text
    assert len(page) < 60_000
    assert "\x00" not in page


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    rows = [TinySample("html", {"jpg": b"<!doctype html>", "txt": b"x"}), TinySample("mute", tiny_sample("a").members)]
    del rows[1].members["txt"], rows[1].members["json"]
    make.write_shard(tmp_path / "s" / "0.tar", rows)
    shard = make.write_shard(tmp_path / "s" / "1.tar", [tiny_sample("b"), tiny_sample("c")], indexed=False)
    os.truncate(shard, 4000)
    summary = view(ViewOptions(str(tmp_path / "s"), tmp_path / "sheet.html", workers=1))
    text = Tags((tmp_path / "sheet.html").read_text(encoding="utf-8")).text
    assert summary.unusable == 3
    for reason in ("undecodable", "no_caption", "truncated", "the shard itself"):
        assert reason in text, reason


def test_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sheet.html"
    command = ["data", "view", str(shards), "--out", str(out), "--count", "3", "--quiet", "--workers", "1"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "samples": 3, "unusable": 0}
    before = out.read_bytes()
    (tmp_path / "empty").mkdir()
    assert main(["data", "view", str(tmp_path / "empty"), "--out", str(out), "--quiet"]) == 2
    assert "no .tar shards" in capsys.readouterr().err
    assert main([*command, "--side", "3"]) == 2
    assert "side must lie in" in capsys.readouterr().err
    assert out.read_bytes() == before
