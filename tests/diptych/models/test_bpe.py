"""The fast tokeniser gives open_clip's ids, whatever the text."""

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.models.towers.bpe import BpeTokenizer

THEIRS = open_clip.SimpleTokenizer(context_length=20)
OURS = BpeTokenizer(open_clip.SimpleTokenizer(context_length=20), 20)

TEXTS = [
    "",
    "a photo of a dog",
    "A  PHOTO\tof\n a DOG's 1234 tails!!",
    "caf\u00e9 \u201cquoted\u201d &amp;amp; fish &lt;b&gt;",
    "\u72d0\u72f8 \u82b1 \U0001f98a\u200d\U0001f98a",
    "sch\u00c3\u00b6n, mis-decoded",
    "<start_of_text> <END_OF_TEXT> inside",
    "don't we're they'll I'd i've",
    "word " * 200,
    "supercalifragilisticexpialidocious_" * 5,
    "a\x00b\x1b[31mc\u2028d\xa0e",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_open_clips(text: str) -> None:
    for _ in range(2):  # new, and remembered
        assert OURS([text]).equal(THEIRS([text]))


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_ids_of_any_text_are_open_clips(texts: list[str]) -> None:
    assert OURS(texts).equal(THEIRS(texts))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80))
def test_ids_of_plain_text_are_open_clips(text: str) -> None:
    assert OURS([text]).equal(THEIRS([text]))


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_other_ways_of_cleaning(clean: str) -> None:
    theirs = open_clip.SimpleTokenizer(context_length=20, clean=clean)
    ours = BpeTokenizer(open_clip.SimpleTokenizer(context_length=20, clean=clean), 20)
    assert ours(TEXTS).equal(theirs(TEXTS))


def test_new_words_do_not_pile_up() -> None:
    theirs = open_clip.SimpleTokenizer(context_length=20)
    before = len(theirs.cache)
    BpeTokenizer(theirs, 20)([f"word{number}x{number * 7919}" for number in range(500)])
    assert len(theirs.cache) == before
