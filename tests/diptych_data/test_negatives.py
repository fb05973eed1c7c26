"""The writer: what it changes in shards, that it can be killed, and that no negative is true of its picture."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.data import captions, index
from diptych.data.captions import CaptionConfig, HardCaptionConfig, choose_hard
from diptych.data.shards import RawSample, list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych.testing import TinySample, tiny_sample
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.judge import Judge, broken
from diptych_data.negatives.lexicon import read_lexicon
from diptych_data.negatives.make import NegativesSummary, negatives
from diptych_data.negatives.options import NegativesOptions
from diptych_data.negatives.phrase import parse
from diptych_data.negatives.rules.family import Rule
from diptych_data.negatives.words import normal

LEXICON = read_lexicon()
PROGRAM = """
import sys
from pathlib import Path
from diptych.config import from_tree
from diptych_data.negatives.make import negatives
from diptych_data.negatives.options import NegativesOptions

if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    negatives(from_tree(NegativesOptions, {"shards": source, "out": out, "workers": int(workers), "refine": None}))
"""
CAPTIONS = (
    "a red fox on a green chair",
    "two hearts",
    "woman cook: dark skin tone",
    "a dog chasing a cat",
    "owl",
    "zzz",
)


def hard_shards(folder: Path, sizes: tuple[int, ...] = (12, 0, 9, 7)) -> Path:
    """Shards whose captions the lexicon knows, each text several times over."""
    number = 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            samples.append(tiny_sample(f"s{number:04d}", caption=CAPTIONS[number % len(CAPTIONS)]))
            number += 1
        make.write_shard(folder / f"{shard:06d}.tar", samples)
    return folder


def run(shards: Path, out: Path, **options: object) -> NegativesSummary:
    return negatives(from_tree(NegativesOptions, {"shards": str(shards), "out": str(out), "refine": None} | options))


def content(folder: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def document(sample: RawSample) -> dict[str, object]:
    return json.loads(sample.members["json"])


def propose(rule: str, caption: str) -> set[tuple[str, str]]:
    made = Rule.named(rule)().propose(parse(caption, LEXICON), np.random.default_rng(0))
    return {(one.text, one.type) for one in made}


# --- the shards ------------------------------------------------------------------------------------------------------


def test_all_members_but_the_json_keep_their_bytes_and_the_json_its_keys(tmp_path: Path) -> None:
    shards = hard_shards(tmp_path / "in")
    summary = run(shards, tmp_path / "out", workers=1)
    before, after = content(shards), content(tmp_path / "out")
    assert summary.samples == len(before) == len(after) == 28
    assert summary.shards == 4
    for old, new in zip(before, after, strict=True):
        assert (old.key, list(old.members)) == (new.key, list(new.members))
        assert all(new.members[name] == data for name, data in old.members.items() if name != "json")
        was, now = document(old), document(new)
        assert now["meta"] == was["meta"]
        assert now["captions"]["name"] == was["captions"]["name"]  # type: ignore[index]
    for tar in (tmp_path / "out").glob("*.tar"):
        assert index.read(tar) == index.scan(tar)
    assert not list(tmp_path.glob(".*"))


def test_training_reads_what_was_written(tmp_path: Path) -> None:
    run(hard_shards(tmp_path / "in"), tmp_path / "out", workers=1, without="drop")
    config = CaptionConfig(hard=HardCaptionConfig(column="hard", count=3))
    for sample in content(tmp_path / "out"):
        said = captions.parse(sample.members)
        chosen = choose_hard(said, config, np.random.default_rng(0))
        assert len(chosen) == 3
        assert sample.members["txt"].decode() not in chosen


def test_each_negative_has_a_record_and_few_are_written(tmp_path: Path) -> None:
    summary = run(hard_shards(tmp_path / "in"), tmp_path / "out", workers=1, per_picture=2)
    kinds: dict[str, int] = {}
    for sample in content(tmp_path / "out"):
        now = document(sample)
        records = [Negative(**one) for one in now["negatives"]]  # type: ignore[attr-defined]
        assert [one.text for one in records] == now["captions"]["hard"]  # type: ignore[index]
        assert len(records) <= 2
        assert {one.of for one in records} <= {sample.members["txt"].decode()}
        for one in records:
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
    assert summary.kinds == dict(sorted(kinds.items()))
    assert summary.without == sum(not document(s)["negatives"] for s in content(tmp_path / "out")) == 4
    written = json.loads((tmp_path / "out" / "negatives.json").read_text())["summary"]
    assert (written["kinds"], written["dropped"], written["without"]) == (summary.kinds, summary.dropped, 4)


@pytest.mark.parametrize(
    ("extra", "read"),
    [
        ({"captions": {"name": "a red fox", "hard": ["a fox of old"]}}, ["a fox of old"]),
        ({"captions": ["a red fox", "animal"], "hard": "a fox of old"}, ["a fox of old"]),
        ({"caption": "a red fox"}, []),
        ({"negatives": "not ours"}, []),
        ({"name": "half \ud800 a pair"}, []),
    ],
)
def test_others_forms_of_json_lose_nothing(tmp_path: Path, extra: dict[str, object], read: list[str]) -> None:
    base = tiny_sample("a", caption="a red fox")
    sample = TinySample("a", base.members | {"json": json.dumps(extra).encode()})
    make.write_shard(tmp_path / "in" / "000000.tar", [sample])
    run(tmp_path / "in", tmp_path / "out", workers=1)
    (new,) = content(tmp_path / "out")
    said, old = captions.parse(new.members), captions.parse(sample.members)
    texts = said.texts("hard")
    assert texts[: len(read)] == read
    assert len(texts) > len(read)
    for column in ("caption", "captions", "name"):
        assert said.texts(column) == old.texts(column)


def test_a_sample_without_json_gets_one(tmp_path: Path) -> None:
    members = {name: data for name, data in tiny_sample("a", caption="two owls").members.items() if name != "json"}
    make.write_shard(tmp_path / "in" / "000000.tar", [TinySample("a", members)])
    run(tmp_path / "in", tmp_path / "out", workers=1)
    (new,) = content(tmp_path / "out")
    assert captions.parse(new.members).texts("hard")


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    good = tiny_sample("good", caption="an owl")
    bad = TinySample("bad", good.members | {"json": b"[1]"})
    make.write_shard(tmp_path / "in" / "000000.tar", [good, bad])
    summary = run(tmp_path / "in", tmp_path / "out", workers=1)
    assert (summary.samples, summary.skipped) == (1, {"bad_caption": 1})
    assert [one.key for one in content(tmp_path / "out")] == ["good"]


def test_samples_without_negatives_can_be_dropped_and_a_set_of_them_is_refused(tmp_path: Path) -> None:
    shards = hard_shards(tmp_path / "in")
    summary = run(shards, tmp_path / "out", workers=1, without="drop")
    assert (summary.samples, summary.skipped, summary.without) == (24, {"no_negative": 4}, 4)
    make.write_shard(tmp_path / "none" / "000000.tar", [tiny_sample("a", caption="zzz")])
    with pytest.raises(DataError, match="no sample to write"):
        run(tmp_path / "none", tmp_path / "out2", workers=1, without="drop")
    assert not (tmp_path / "out2").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"columns": ["hard"]}, "columns"),
        ({"per_picture": 0}, "per_picture"),
        ({"rules": []}, "rules"),
        ({"rules": ["swop"]}, "swap"),
        ({"refine": {"max_bias": 0.7}}, "max_bias"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(hard_shards(tmp_path / "in"), tmp_path / "out", **wrong)


def test_the_output_is_not_the_input_and_not_overwritten_unasked(tmp_path: Path) -> None:
    shards = hard_shards(tmp_path / "in")
    with pytest.raises(DataError, match="where the input lies"):
        run(shards, shards)
    run(shards, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="not empty"):
        run(shards, tmp_path / "out")
    run(shards, tmp_path / "out", workers=1, overwrite=True, per_picture=1)
    assert all(len(document(one)["negatives"]) <= 1 for one in content(tmp_path / "out"))  # type: ignore[arg-type]


# --- equal bytes -----------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    shards = hard_shards(tmp_path / "in")
    for name, options in {"one": {"workers": 1}, "three": {"workers": 3}, "other": {"workers": 1, "seed": 1}}.items():
        run(shards, tmp_path / name, **options)
    one, three, other = (files(tmp_path / name) for name in ("one", "three", "other"))
    assert one == three
    assert one["000000.tar"] != other["000000.tar"]


@pytest.mark.parametrize(("workers", "stage"), [(1, "candidates"), (1, "shards"), (2, "shards")])
def test_a_killed_writer_goes_on(tmp_path: Path, workers: int, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diptych_data")
    shards = hard_shards(tmp_path / "in", (15,) * 40)
    run(shards, tmp_path / "whole")
    words = [sys.executable, "-c", PROGRAM, str(shards), str(tmp_path / "out"), str(workers)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as process:
        pattern = ".out.work/candidates/*.json" if stage == "candidates" else ".out.tmp/*.tar.index.jsonl"
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob(pattern))) < 5:
            assert process.poll() is None, "it was done before it could be disturbed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    time.sleep(0.5 if workers > 1 else 0)  # workers notice that their parent is gone
    caplog.clear()
    run(shards, tmp_path / "out")
    assert "goes on" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_other_options_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = hard_shards(tmp_path / "in", (15,) * 20)
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(shards, tmp_path / "out"), kwargs={"workers": 1}
    )
    process.start()
    while not list(tmp_path.glob(".out.work/candidates/*.json")):
        time.sleep(0.002)
    process.kill()
    process.join()
    run(shards, tmp_path / "out", workers=1, seed=3)
    assert "thrown away" in caplog.text
    run(shards, tmp_path / "whole", workers=1, seed=3)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# --- what is a negative ----------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("a", "the", "red", "blue", "dark skin tone", "two", "three", "man", "woman", "and", "with", "on", "under"),
        *("fox", "foxes", "owl", "sofa", "couch", ":", ",", "left", "right", "walking", "zzz", "A", "Woman", "hat"),
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 99))
def test_no_negative_equals_a_true_caption_of_its_picture(texts: list[str], seed: int) -> None:
    judge = Judge(texts, LEXICON, LEXICON.are_alike)
    proposals = [
        one.text
        for rule in ("replace", "swap", "add", "order")
        for one in Rule.named(rule)().propose(parse(texts[0], LEXICON), np.random.default_rng(seed))
    ]
    kept = [text for text in proposals if not judge.reason(text, texts[0])]
    truths = {normal(text) for text in texts}
    assert not truths & {normal(text) for text in kept}
    assert len({normal(text) for text in kept}) == len(kept)


def test_no_negative_of_written_shards_is_true_though_captions_are_variants_of_each_other(tmp_path: Path) -> None:
    """Each picture has every colour but one as a caption: what is left is that one, or nothing."""
    colours = LEXICON.categories["colour"].words
    truths = [f"{colour} vase" for colour in colours if colour != "pink"]
    document = json.dumps({"captions": {"name": truths}}).encode()
    members = tiny_sample("a", caption="red vase").members | {"json": document}
    make.write_shard(tmp_path / "in" / "000000.tar", [TinySample("a", members)])
    rules = [{"type": "replace", "per_slot": 50}]
    run(tmp_path / "in", tmp_path / "out", workers=1, rules=rules, columns=["name"], per_picture=40)
    (new,) = content(tmp_path / "out")
    texts = captions.parse(new.members).texts("hard")
    assert texts
    assert all("pink vase" in text or "vase" not in text for text in texts)


@pytest.mark.parametrize(
    ("text", "of", "reason"),
    [
        ("A Red Fox!", "a red fox", "equal"),
        ("the red  fox", "a red fox", "empty"),  # clean() made it before; two spaces are nobody's caption
        ("a crimson animal", "a red fox", "mentioned"),
        ("a sofa", "a couch", "synonymous"),
        ("man and woman", "woman and man", "synonymous"),
        ("family: man, woman", "family: woman, man", "synonymous"),
        ("", "a red fox", "empty"),
        ("?!", "a red fox", "empty"),
        ("owl " * 400, "a red fox", "too_long"),
        ("a red owl owl", "a red fox", "repeated"),
        ("owl a owl b owl c owl", "a red fox", "repeated"),
        ("a red owl", "a red fox", ""),
    ],
)
def test_reasons(text: str, of: str, reason: str) -> None:
    truths = [of, "animal"]
    assert Judge(truths, LEXICON, LEXICON.are_alike).reason(text, of) == reason


def test_what_the_caption_itself_repeats_is_not_held_against_its_negatives() -> None:
    assert broken("family: boy, boy, girl", "family: boy, boy") == ""
    assert broken("no no mountain", "no no hill") == ""


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("woman cook: dark skin tone", {("man cook: dark skin tone", "gender")}),
        ("person walking: facing right", {("person walking: facing left", "direction")}),
        ("thumbs up", {("thumbs down", "direction")}),
        ("Men’s room", {("Women’s room", "gender")}),
        ("left-right arrow", {("up-down arrow", "direction")}),
        ("A man", {("A woman", "gender")}),
    ],
)
def test_a_word_is_replaced_by_its_opposite(caption: str, expected: set[tuple[str, str]]) -> None:
    assert expected <= propose("replace", caption)


def test_replacing_keeps_number_article_and_capital() -> None:
    for text, _ in propose("replace", "An owl"):
        article, word = text.split(" ", 1)
        assert article == ("An" if word[0] in "aeiou" and not word.startswith("unicorn") else "A"), text
    animals = {text for text, kind in propose("replace", "foxes") if kind == "object"}
    assert animals
    assert not animals & set(LEXICON.categories["animal"].words) - {"fish", "deer", "sheep", "moose", "bison", "squid"}
    assert all(text.startswith("Two ") for text, kind in propose("replace", "Two foxes") if kind == "object")


def test_a_word_means_what_its_place_says() -> None:
    def types(caption: str) -> list[str]:
        return [slot.type for slot in parse(caption, LEXICON).slots]

    assert types("orange book") == ["colour", "object"]
    assert types("an orange") == ["object"]
    assert types("hot dog") == ["object"]
    assert types("four o’clock") == ["count"]
    assert types("keycap: 4") == ["count"]
    assert types("pool 8 ball") == []
    assert types("ON! arrow") == []
    assert types("owl on hat") == ["object", "relation", "object"]


def test_swap_changes_meaning_or_nothing() -> None:
    assert ("a cat chasing a dog", "object") in propose("swap", "a dog chasing a cat")
    assert ("white cat and black dog", "colour") in propose("swap", "black cat and white dog")
    for same in ("cat and dog", "family: man, woman", "red and blue", "black cat and white cat", "owl next to fox"):
        assert propose("swap", same) == set(), same


def test_order_moves_words_around_a_function_word_only() -> None:
    assert ("joy with tears of cat", "order") in propose("order", "cat with tears of joy")
    for same in ("purple circle", "cup with straw", "sad but relieved", "bread and butter", "arm: light skin tone"):
        assert propose("order", same) == set(), same


def test_add_says_more() -> None:
    for text, kind in propose("add", "an owl"):
        assert kind in ("attribute", "object")
        assert text.startswith(("a ", "an "))
        assert "owl" in text
        assert len(text) > len("an owl")
    assert not any(kind == "object" for _, kind in propose("add", "flag: Togo"))


def test_sub_captions_grow_and_paraphrases_say_the_same(tmp_path: Path) -> None:
    caption = "a brown dog on a sofa near a window"
    make.write_shard(tmp_path / "in" / "000000.tar", [tiny_sample("a", caption=caption)])
    run(tmp_path / "in", tmp_path / "out", workers=1)
    (new,) = content(tmp_path / "out")
    said = captions.parse(new.members)
    assert said.texts("sub") == ["a dog", "a brown dog", "a brown dog on a sofa"]
    assert said.texts("paraphrase") == ["a brown dog on a couch near a window"]
    truths = {normal(text) for column in ("txt", "name", "sub", "paraphrase") for text in said.texts(column)}
    assert not truths & {normal(text) for text in said.texts("hard")}


def test_a_denial_has_no_parts() -> None:
    from diptych_data.negatives.positives import sub_captions

    assert sub_captions(parse("no bicycles on the path", LEXICON)) == []


# --- words of one's own ----------------------------------------------------------------------------------------------


def test_a_lexicon_of_ones_own_is_laid_over(tmp_path: Path) -> None:
    own = {"categories": {"cheese": {"type": "object", "words": ["brie", "gouda"]}}, "synonyms": [["owl", "fox"]]}
    path = tmp_path / "cheese.json"
    path.write_text(json.dumps(own))
    lexicon = read_lexicon(path)
    assert [slot.meaning.category.name for slot in parse("brie", lexicon).slots] == ["cheese"]
    assert lexicon.are_alike("fox", "owl")
    assert not LEXICON.are_alike("fox", "owl")
    make.write_shard(tmp_path / "in" / "000000.tar", [tiny_sample("a", caption="brie")])
    run(tmp_path / "in", tmp_path / "out", workers=1, lexicon=str(path))
    (new,) = content(tmp_path / "out")
    assert captions.parse(new.members).texts("hard") == ["gouda"]


@pytest.mark.parametrize("text", ["{", '{"colours": []}', '{"categories": {"x": {"type": "y"}}}', "[]"])
def test_a_broken_lexicon_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no lexicon"):
        run(hard_shards(tmp_path / "in"), tmp_path / "out", lexicon=str(path))


def test_every_word_of_the_lexicon_is_found_again() -> None:
    for category in LEXICON.categories.values():
        assert len(category.words) > 1, category.name
        if category.before or category.after or category.before_word or category.whole:
            continue
        for word in category.words:
            (slot, *_) = parse(word, LEXICON).slots
            assert slot.last == len(parse(word, LEXICON).tokens), word


def test_a_tagger_finds_nouns_that_the_lexicon_does_not_know() -> None:
    def tag(words: object) -> list[str]:
        return ["NN" if word == "zzz" else "DT" for word in words]  # type: ignore[attr-defined]

    phrase = parse("the zzz", LEXICON, tag)
    (slot,) = phrase.slots
    assert (slot.type, slot.meaning.word) == ("object", "zzz")
    proposals = {one.text for one in Rule.named("replace")().propose(phrase, np.random.default_rng(0))}
    assert len(proposals) == 6


@pytest.mark.parametrize(("option", "library"), [("tagger=textblob", "TextBlob"), ("synonyms=wordnet", "WordNet")])
def test_a_missing_library_is_one_line(
    tmp_path: Path, option: str, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("textblob", "textblob.en.taggers", "nltk", "nltk.corpus"):
        monkeypatch.setitem(sys.modules, name, None)
    shards = hard_shards(tmp_path / "in")
    assert main(["data", "negatives", str(shards), str(tmp_path / "out"), option]) == 2
    assert library in capsys.readouterr().err


def test_the_verb_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = hard_shards(tmp_path / "in")
    assert main(["data", "negatives", str(shards), str(tmp_path / "out"), "refine=null", "workers=1"]) == 0
    text = capsys.readouterr().out
    assert "for 24 of 28 samples in 4 shards" in text
    dropped = ["refine=null", "workers=1", "without=drop"]
    assert main(["data", "negatives", str(shards), str(tmp_path / "o3"), *dropped]) == 0
    assert "for 24 of 28 samples in 4 shards" in capsys.readouterr().out
    assert "replace object" in text
    assert main(["data", "negatives", str(shards), str(tmp_path / "o2"), "refine=null", "workers=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 28
