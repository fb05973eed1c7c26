import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.data.captions import (
    CaptionConfig,
    Captions,
    CaptionView,
    HardCaptionConfig,
    choose,
    choose_hard,
    clean,
    parse,
    read,
)
from diptych.data.faults import UnusableSample
from diptych.data.text_augment import TextAugmentConfig
from diptych.seeding import generator

CAPTIONS = Captions({"name": ("waving hand",), "keywords": ("bye", "hello", "wave"), "empty": ()})


def draws(config: CaptionConfig, count: int = 200) -> list[str]:
    return [choose(CAPTIONS, config.views, config, generator(0, i)) for i in range(count)]


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
        draws(CaptionConfig((CaptionView(("empty",)),)), 1)


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
    columns = Captions({"txt": ("right",), "wrong": ("a", " b\n", "c", "d", "  ")})
    rng = generator(0, "hard")
    drawn = [choose_hard(columns, config, rng) for _ in range(50)]
    assert all(len(set(texts)) == 3 for texts in drawn)
    assert {text for texts in drawn for text in texts} == {"a", "b", "c", "d"}
    assert choose_hard(Captions({"wrong": ("a",)}), config, rng) == ("a", "a", "a")
    assert choose_hard(columns, CaptionConfig(), rng) == ()
    with pytest.raises(UnusableSample, match="no_hard_caption"):
        choose_hard(Captions({"txt": ("right",)}), config, rng)


@pytest.mark.parametrize(
    ("pick", "expected"),
    [("first", {"bye"}), ("random", {"bye", "hello", "wave"}), ("all", {"bye, hello, wave"})],
)
def test_rules_of_choice(pick: str, expected: set[str]) -> None:
    assert set(draws(CaptionConfig((CaptionView(("keywords",), pick=pick),)), 60)) == expected


def test_texts_are_drawn_by_their_scores() -> None:
    document = {"captions": {"synthetic": ["a", "b", "c"]}, "clip_score": [3, 0, 1.0]}
    captions = parse({"json": json.dumps(document).encode()})
    config = CaptionConfig((CaptionView(("synthetic",), pick="weighted", scores="clip_score"),))
    drawn = [choose(captions, config.views, config, generator(0, i)) for i in range(2000)]
    assert set(drawn) == {"a", "c"}
    assert abs(drawn.count("a") / 2000 - 0.75) < 0.04  # four standard deviations
    other = parse({"json": json.dumps(document | {"clip_score": [1, 2]}).encode()})
    with pytest.raises(UnusableSample, match="bad_caption"):
        choose(other, config.views, config, generator(0))


def test_others_forms_of_captions() -> None:
    assert read({"json": b'{"caption": "one", "url": "x"}'}) == {"caption": ("one",)}
    assert read({"json": b'{"captions": ["a", "b"]}'}) == {"captions": ("a", "b")}
    named = parse({"json": b'{"TEXT": "from a key that only a view knows"}'})
    config = CaptionConfig((CaptionView(("TEXT",)),))
    assert choose(named, config.views, config, generator(0)) == "from a key that only a view knows"


def test_language_names_columns() -> None:
    config = CaptionConfig((CaptionView(("name_{language}", "txt")),), hard=HardCaptionConfig("hard_{language}"))
    german = config.in_language("de")
    assert german.views[0].columns == ("name_de", "txt")
    assert german.hard == HardCaptionConfig("hard_de")


def test_forms_of_unicode_and_lengths() -> None:
    assert clean("ﬁne\u00a0\x00 line\u2028\x85end", form="NFKC") == "fine line end"
    assert clean("e\u0301") == "é"
    assert clean("\u0001\u0002") == ""
    config = CaptionConfig((CaptionView(("name",)),), min_chars=20)
    with pytest.raises(UnusableSample, match="no_caption"):
        draws(config, 1)


SENTENCES = "One dog runs. Two cats sleep! Does it rain?"


def augmented(**settings: float) -> set[str]:
    captions = Captions({"txt": (SENTENCES,)})
    config = CaptionConfig(augment=TextAugmentConfig(**settings))
    return {choose(captions, config.views, config, generator(0, i)) for i in range(200)}


def test_sub_captions_are_runs_of_sentences() -> None:
    runs = {"One dog runs.", "Two cats sleep!", "Does it rain?", "One dog runs. Two cats sleep!"}
    assert augmented(sub_caption=1.0) == runs | {"Two cats sleep! Does it rain?"}
    assert SENTENCES in augmented(sub_caption=0.5)


def test_word_dropout_leaves_at_least_one_word_in_order() -> None:
    words = SENTENCES.split()
    for text in augmented(word_dropout=0.9):
        kept = [words.index(word) for word in text.split()]
        assert kept
        assert kept == sorted(kept)
    assert len(augmented(word_dropout=1.0)) == len(words)
    assert augmented() == {SENTENCES}


@pytest.mark.parametrize(
    ("document", "expected", "shortest"),
    [
        ({"captions": {"c": [None, "x", 3]}}, "x", 1),
        ({"captions": {"c": "ein \ud83d Bild", "score": 0.3}}, "ein ? Bild", 1),
        ({"captions": {"c": " " * 9000 + "late"}}, "late", 1),
        ({"captions": {"c": ["\ufeff", "  ", "good"]}}, "good", 2),
        ({"captions": {"c": ["ab", "long enough"]}}, "long enough", 3),
    ],
)
def test_only_texts_worth_reading_are_captions(document: dict[str, object], expected: str, shortest: int) -> None:
    captions = parse({"json": json.dumps(document).encode()})
    config = CaptionConfig((CaptionView(("c",)), CaptionView(("c", "none"))), min_chars=shortest)
    assert {choose(captions, config.views, config, generator(0, i)) for i in range(20)} == {expected}


def test_a_byte_order_mark_is_no_text() -> None:
    assert read({"txt": b"\xef\xbb\xbffine"}) == {"txt": ("fine",)}


def test_scores_belong_to_their_texts_whatever_is_left_out() -> None:
    document = {"captions": {"c": ["a", " ", "b"], "score": [1, 5, 0]}}
    captions = parse({"json": json.dumps(document).encode()})
    config = CaptionConfig((CaptionView(("c",), pick="weighted", scores="score"),))
    assert {choose(captions, config.views, config, generator(0, i)) for i in range(40)} == {"a"}
    for scores in ([10**400, 1, 1], [1, 1], "none", [0, 0, 0], [1, True, 1]):
        captions = parse({"json": json.dumps({"captions": {"c": ["a", "d", "b"], "score": scores}}).encode()})
        with pytest.raises(UnusableSample, match="bad_caption"):
            choose(captions, config.views, config, generator(0))


def test_limits_are_of_what_was_written_not_of_what_dropout_left() -> None:
    captions = Captions({"txt": ("a red dog",)})
    config = CaptionConfig(min_chars=4, augment=TextAugmentConfig(word_dropout=0.9))
    assert "a" in {choose(captions, config.views, config, generator(0, i)) for i in range(200)}


def test_megabytes_of_json_are_not_parsed() -> None:
    with pytest.raises(UnusableSample, match="bad_caption"):
        parse({"json": b"[" + b"{}," * 2_000_000 + b"{}]"})
