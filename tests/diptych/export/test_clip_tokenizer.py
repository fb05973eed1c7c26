from pathlib import Path

import open_clip
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.export import clip_tokenizer

THEIRS = open_clip.SimpleTokenizer(context_length=24)
OURS = clip_tokenizer.build()
CAPTIONS = [
    "a red fox",
    "",
    "   ",
    "!",
    "It's  the CAT's\tfriends' 2nd\nphoto, 12.5 km!!",
    "it’s a ‘quoted’ “word”",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE} cafe\N{COMBINING ACUTE ACCENT} na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve",
    "ﬁne waﬄes, ﬀ",
    "一只红狐狸，在草地上！（照片）",
    "ＦＵＬＬ　ｗｉｄｔｈ　ｶﾀｶﾅ",
    "rock &amp; roll &lt;b&gt; &quot;x&quot; &amp;amp; &#39;y&#39; &nbsp;z",
    "лиса на траве 🦊👩‍🚀 ½ ™ … — № \N{ZERO WIDTH SPACE}x",
    "zero\x00width\ufeff",
    "<start_of_text> fox <end_of_text> tail",
    "<|startoftext|> fox <|endoftext|> tail",
    "straße İstanbul ΑΣ",
    "a very long caption " * 20,
]


def ids(text: str) -> list[int]:
    """open_clip's, without padding."""
    return [THEIRS.sot_token_id, *THEIRS.encode(text), THEIRS.eot_token_id]


@pytest.mark.parametrize("text", CAPTIONS)
def test_ids_are_open_clips(text: str) -> None:
    assert OURS.encode(text).ids == ids(text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_characters="&\x7f", exclude_categories=["Cc"]))
)
def test_ids_of_latin_texts(text: str) -> None:
    import ftfy

    if ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False):  # wrong encodings are repaired there alone
        assert OURS.encode(text).ids == ids(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer.write(written, 24)
    return written


@pytest.mark.parametrize("text", CAPTIONS)
def test_transformers_pads_and_cuts_as_open_clip(folder: Path, text: str) -> None:
    found = transformers.AutoTokenizer.from_pretrained(folder)(text, padding="max_length", truncation=True)
    expected = THEIRS(text)[0]
    length = sum(found.attention_mask)
    assert found.input_ids[:length] == expected[:length].tolist()
    assert set(found.input_ids[length:]) <= {THEIRS.eot_token_id}
    assert not expected[length:].any()


def test_clips_own_class_opens_it_too(folder: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    plain = [text for text in CAPTIONS if text.isascii() and "&" not in text and "\x00" not in text and "<" not in text]
    assert len(plain) > 4
    for text in plain:
        assert theirs(text).input_ids == ids(text)
