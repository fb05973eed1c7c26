import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.data.captions import CaptionConfig, CaptionView, HardCaptionConfig, choose, choose_hard, clean, read
from diptych.data.faults import UnusableSample
from diptych.seeding import generator

CAPTIONS = {"name": ("waving hand",), "keywords": ("bye", "hello", "wave"), "empty": ()}


def draws(config: CaptionConfig, count: int = 200) -> list[str]:
    return [choose(CAPTIONS, config, generator(0, i)) for i in range(count)]


def test_views_are_drawn_by_weight() -> None:
    config = CaptionConfig((CaptionView(("name",), weight=3), CaptionView(("keywords",), weight=1)))
    drawn = draws(config, 2000)
    assert abs(drawn.count("waving hand") / 2000 - 0.75) < 0.04
    assert set(drawn) == {"waving hand", "bye", "hello", "wave"}


def test_joined_views_begin_with_the_first_column_and_add_up_to_max_texts() -> None:
    drawn = set(draws(CaptionConfig((CaptionView(("name", "keywords"), max_texts=2),))))
    assert all(text.startswith("waving hand, ") for text in drawn)
    assert {text.count(",") for text in drawn} == {1, 2}


def test_templates_and_columns_that_are_not_there() -> None:
    config = CaptionConfig((CaptionView(("missing",)), CaptionView(("name",), templates=("a drawing of {}",))))
    assert set(draws(config, 20)) == {"a drawing of waving hand"}


def test_no_text_is_unusable() -> None:
    with pytest.raises(UnusableSample, match="no_caption"):
        choose(CAPTIONS, CaptionConfig((CaptionView(("empty",)),)), generator(0))


def test_captions_are_read_from_json_and_text() -> None:
    document = json.dumps({"captions": {"name": "one", "many": ["a", "b"]}}).encode()
    assert read({"txt": b"t", "json": document}) == {"txt": ("t",), "name": ("one",), "many": ("a", "b")}


@pytest.mark.parametrize("members", [{"txt": b"\xff"}, {"json": b"{"}, {"json": b"[1]"}, {"json": b"[" * 100_000}])
def test_texts_that_cannot_be_read_are_bad(members: dict[str, bytes]) -> None:
    with pytest.raises(UnusableSample, match="bad_caption"):
        read(members)


@given(st.text(max_size=60))
def test_clean_text_has_no_control_characters_and_is_stable(text: str) -> None:
    once = clean(text, max_chars=40)
    assert clean(once, max_chars=40) == once
    assert len(once) <= 40
    assert not any(ord(character) < 32 for character in once)


def test_hard_captions_are_drawn_from_their_column() -> None:
    config = CaptionConfig(hard=HardCaptionConfig("wrong", count=3))
    columns = {"txt": ("right",), "wrong": ("a", " b\n", "c", "d", "  ")}
    rng = generator(0, "hard")
    drawn = [choose_hard(columns, config, rng) for _ in range(50)]
    assert all(len(set(texts)) == 3 for texts in drawn)
    assert {text for texts in drawn for text in texts} == {"a", "b", "c", "d"}
    assert choose_hard({"wrong": ("a",)}, config, rng) == ("a", "a", "a")
    assert choose_hard(columns, CaptionConfig(), rng) == ()
    with pytest.raises(UnusableSample, match="no_hard_caption"):
        choose_hard({"txt": ("right",)}, config, rng)
