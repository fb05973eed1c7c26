"""Captions to words as COCO's caption evaluation has them: lower case, contractions in two, punctuation dropped.

A rendering of the rules of the Penn Treebank's tokenizer, which that evaluation runs as a program in Java; rare forms,
such as URLs, may come out otherwise. In scripts without spaces between words every sign is a word.
"""

import re
import unicodedata

Words = tuple[str, ...]

# Letters with their signs: `\w` alone would cut words of Arabic and Indic scripts at their vowels.
_LETTER = r"[\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff]"
_SIGN = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
_LETTERS = rf"(?:(?!{_SIGN}){_LETTER})+"
_CLITIC = r"(?:n't|'(?:s|re|ve|ll|d|m))(?!\w)"
_TOKEN = re.compile(
    rf"""{_SIGN}
    | (?:[a-z]\.){{2,}} | (?:mr|mrs|ms|dr|jr|sr|st|vs|etc)\.
    | {_CLITIC}
    | {_LETTERS} (?: (?: [-./&'] | (?<=\d)[,:](?=\d) ) {_LETTERS} )*
    | [!?]+ | \.{{2,}} | -{{2,}} | \S""",
    re.VERBOSE,
)
_PAIR = re.compile(r"\b(?:cannot|gonna|wanna|gotta|gimme|lemme)\b")
_PUNCTUATION = frozenset(("--", "...", *"'\"`.?!,:;-–—。、，؟،।"))
_QUOTES = str.maketrans("‘’“”", "''\"\"")


def words(text: str) -> Words:
    """The words of a caption; none where it has none."""
    plain = unicodedata.normalize("NFC", text).lower().translate(_QUOTES)
    apart = _PAIR.sub(lambda found: f"{found[0][:3]} {found[0][3:]}", plain)
    apart = re.sub(rf"(?<=\w)(?={_CLITIC})", " ", apart)
    return tuple(token for token in _TOKEN.findall(apart) if token not in _PUNCTUATION)
