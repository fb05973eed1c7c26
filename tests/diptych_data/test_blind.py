"""The blind test finds what gives negatives away, and nothing else; refinement hides it or drops it."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.errors import DataError
from diptych.testing import TinySample, tiny_sample
from diptych_data import blind as blind_module
from diptych_data.blind import BlindOptions, blind, measure
from diptych_data.negatives import guesser, ngrams, refine
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.make import NegativesSummary, negatives
from diptych_data.negatives.options import NegativesOptions, RefineConfig
from diptych_data.negatives.refine import Refinement
from diptych_data.negatives.select import choose

WORDS = ["fox", "owl", "hat", "drum", "sofa", "tree", "ship", "bell"]
COLOURS = ["red", "blue", "green", "white"]


def pairs(count: int, *, giveaway: str = "", seed: int = 0) -> list[Negative]:
    """Two texts of which chance says which is true; then the false one may get a word more."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        one, other = (COLOURS[i] for i in rng.permutation(len(COLOURS))[:2])
        thing = f"{WORDS[rng.integers(len(WORDS))]} number{number}"
        found.append(Negative(f"{giveaway}{other} {thing}", "replace", "colour", f"{one} {thing}"))
    return found


def test_what_chance_decides_is_not_guessed() -> None:
    found = measure(pairs(600), max_pairs=1000, seed=0)
    assert set(found) == {"replace colour", "all"}
    one = found["replace colour"]
    assert (one.pairs, one.captions) == (600, 600)
    assert one.low < 0.5 < one.high


def test_a_giveaway_is_found() -> None:
    assert measure(pairs(200, giveaway="silly "), max_pairs=1000, seed=0)["all"].value > 0.99


def test_captions_are_judged_by_models_that_have_not_seen_them() -> None:
    """Each negative has a word of its own: learned by heart it gives all away, on new captions nothing."""
    own = [Negative(f"red thing odd{n}", "a", "b", f"red thing even{n}") for n in range(300)]
    fold = guesser.folds([one.of for one in own], salt="x")
    rows = ngrams.differences([(one.of, one.text) for one in own])
    elsewhere = (fold + 1) % guesser.FOLDS
    seen = rows.times(guesser.fit(rows, elsewhere, elsewhere)).gather(1, fold[:, None])[:, 0]
    assert (seen > 0).double().mean() > 0.95
    assert torch.equal(fold, guesser.folds([one.of.upper() for one in own], salt="x"))


def test_captions_that_are_each_others_negatives_are_guessed_by_chance() -> None:
    """Every text is true once and false thrice: seen as false alone, it would be taken for false."""
    names = [f"{a} {b}{n}" for n in range(40) for a in ("red", "blue") for b in ("fox", "owl")]
    found = [
        Negative(other, "replace", "object", text)
        for text in names
        for other in names
        if other != text and other.lstrip("abcdefghijklmnopqrstuvwxyz ") == text.lstrip("abcdefghijklmnopqrstuvwxyz ")
    ]
    one = measure(found, max_pairs=10**4, seed=0)["replace object"]
    assert (one.pairs, one.captions) == (480, 160)
    assert 0.4 < one.value < 0.6


def test_each_caption_counts_once() -> None:
    gap = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    found = guesser.accuracy(gap, ["a", "a", "A", "b", "c"])
    assert found.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert (found.pairs, found.captions) == (5, 3)


def test_wilson_gives_the_known_interval() -> None:
    assert guesser.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert guesser.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert guesser.wilson(0.5, 0) == (0.0, 1.0)


def test_the_fit_is_the_minimum_of_a_dense_regression() -> None:
    found = pairs(150, giveaway="")
    rows = ngrams.differences([(one.of, one.text) for one in found])
    fold = guesser.folds([one.of for one in found], salt="x")
    dense = torch.zeros(rows.count, ngrams.DIM, dtype=torch.float64)
    dense[rows.row, rows.column] = rows.value
    assert torch.allclose(dense.norm(dim=1), torch.ones(rows.count, dtype=torch.float64))
    other = guesser.folds([one.text for one in found], salt="x")
    weights = guesser.fit(rows, fold, other).requires_grad_()
    for number in range(guesser.FOLDS):
        inside = dense[(fold != number) & (other != number)]
        loss = torch.nn.functional.softplus(-(inside @ weights[:, number])).mean()
        loss = loss + weights[:, number].square().sum() / (2 * rows.count)
        (gradient,) = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 1e-3  # at w = 0 it is about 0.1


TEXT = st.lists(st.sampled_from(["a", "bb", "c", "red", "fox"]), min_size=1, max_size=7).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(TEXT, TEXT)
def test_a_difference_is_that_of_all_ngrams(true: str, false: str) -> None:
    def grams(text: str) -> Counter[str]:
        words = ("<", *text.split(), ">")
        found = Counter(words) + Counter(map(" ".join, pairwise(words)))
        found += Counter(" ".join(words[i : i + 3]) for i in range(len(words) - 2))
        found += Counter(f"long {size}" for size in range(len(words)))
        parts = [f"<{word}>" for word in words]
        return found + Counter(f"letters {p[i : i + n]}" for p in parts for n in (3, 4) for i in range(len(p) - n + 1))

    expected = torch.zeros(ngrams.DIM, dtype=torch.float64)
    difference = grams(true)
    difference.subtract(grams(false))
    for gram, count in difference.items():
        code = ngrams.crc32(gram.encode())
        expected[code % ngrams.DIM] += count if code >> 31 else -count
    rows = ngrams.differences([(true, false)])
    found = torch.zeros(ngrams.DIM, dtype=torch.float64)
    found[rows.column] = rows.value
    norm = expected.norm()
    assert torch.allclose(found, expected / norm if norm else expected)


# --- the verb --------------------------------------------------------------------------------------------------------


def record_shard(path: Path, found: list[Negative]) -> Path:
    samples = []
    for number, one in enumerate(found):
        document = {"captions": {"hard": [one.text]}, "negatives": [one.document()]}
        members = tiny_sample(f"s{number:04d}", caption=one.of).members | {"json": json.dumps(document).encode()}
        samples.append(TinySample(f"s{number:04d}", members))
    make.write_shard(path, samples)
    return path.parent


def test_negatives_in_shards_are_tested_with_and_without_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record_shard(tmp_path / "in" / "000000.tar", pairs(60, giveaway="silly "))
    plain = [tiny_sample(f"t{n}", caption=f"red {n}", hard=[f"blue {n}", " "]) for n in range(40)]
    make.write_shard(folder / "000001.tar", [*plain, tiny_sample("none")])
    for workers in (1, 2):
        found = blind(BlindOptions(str(folder), workers=workers))
        assert (found.samples, found.pairs) == (100, 100)
        assert {kind: one.pairs for kind, one in found.kinds.items()} == {
            "replace colour": 60,
            "unknown unknown": 40,
            "all": 100,
        }
        assert found.kinds["replace colour"].value > 0.95
    assert main(["data", "blind", str(folder), "workers=1"]) == 0
    assert "replace colour" in capsys.readouterr().out


def test_a_set_without_negatives_is_one_line(tmp_path: Path) -> None:
    make.write_shards(tmp_path / "in", [3])
    with pytest.raises(DataError, match="no negatives in column 'hard'"):
        blind(BlindOptions(str(tmp_path / "in"), workers=1))


def test_records_that_are_none_are_passed_over() -> None:
    odd = {"negatives": [1, {"text": 3}, {"text": "a", "how": "b", "type": "c", "of": "d"}]}
    assert list(blind_module._records(odd)) == [Negative("a", "b", "c", "d")]
    assert list(blind_module._records({"negatives": "x"})) == []


# --- refinement ------------------------------------------------------------------------------------------------------


def pool(count: int, *, fair: bool) -> list[tuple[int, list[Negative]]]:
    """Pictures with a candidate that a word gives away and, if `fair`, two that nothing does."""
    fair_ones = [pairs(count, seed=seed) for seed in (1, 1)]
    pictures = []
    for number in range(count):
        true = fair_ones[0][number].of
        silly = Negative(f"silly {fair_ones[0][number].text}", "replace", "colour", true)
        pictures.append((number, [silly, *({fair_ones[0][number]} if fair else ())]))
    return pictures


def chosen(pictures: list[tuple[int, list[Negative]]], refinement: Refinement, count: int) -> list[Negative]:
    taken: Counter[str] = Counter()
    found = []
    for number, candidates in pictures:
        found += choose(candidates, refinement.keys(candidates, seed=0, number=number), count, taken)
    return found


def test_of_two_candidates_the_one_that_hides_is_chosen() -> None:
    pictures = pool(300, fair=True)
    learned = refine.learn(pictures, RefineConfig(), per_picture=1, seed=0)
    before, after = (chosen(pictures, one, 1) for one in (Refinement(), learned))
    silly = [sum(one.text.startswith("silly") for one in some) for some in (before, after)]
    assert 100 < silly[0] < 200  # chance takes half of them
    assert silly[1] < 30
    accuracies = [measure(some, max_pairs=1000, seed=0)["all"].value for some in (before, after)]
    assert accuracies[0] > 0.7
    assert accuracies[1] < 0.62


def test_what_cannot_be_hidden_goes() -> None:
    pictures = pool(200, fair=False)
    learned = refine.learn(pictures, RefineConfig(), per_picture=1, seed=0)
    assert len(chosen(pictures, Refinement(), 1)) == 200
    assert len(chosen(pictures, learned, 1)) < 10


def test_few_captions_are_not_judged() -> None:
    pictures = pool(30, fair=False)
    learned = refine.learn(pictures, RefineConfig(), per_picture=1, seed=0)
    assert len(chosen(pictures, learned, 1)) == 30


def test_what_was_learned_is_read_as_it_was_written(tmp_path: Path) -> None:
    pictures = pool(200, fair=True)
    learned = refine.learn(pictures, RefineConfig(rounds=2), per_picture=1, seed=0)
    refine.save(learned, tmp_path / "r.safetensors")
    again = refine.load(tmp_path / "r.safetensors")
    for number, candidates in pictures:
        assert again.keys(candidates, seed=0, number=number) == learned.keys(candidates, seed=0, number=number)


def test_kinds_are_balanced() -> None:
    kinds = {"a": 100, "b": 100, "c": 5}
    taken: Counter[str] = Counter()
    for number in range(100):
        some = [
            Negative(f"{kind}{number}{i}", kind, "t", "x") for kind, n in kinds.items() if number < n for i in (0, 1)
        ]
        assert len(choose(some, [0.0] * len(some), 2, taken)) == 2
    assert 3 <= taken["c t"] <= 10
    assert abs(taken["a t"] - taken["b t"]) <= 1
    assert taken.total() == 200


def run(shards: Path, out: Path, **options: object) -> NegativesSummary:
    return negatives(from_tree(NegativesOptions, {"shards": str(shards), "out": str(out)} | options))


def test_the_writer_refines_and_reports_it(tmp_path: Path) -> None:
    things = ("fox", "owl", "lion", "crab", "swan", "goat", "wolf", "snail", "zebra", "otter")
    colours = ("red", "blue", "green", "white", "pink", "black")
    texts = [f"{thing} on a {colour} sofa" for colour in colours for thing in things]
    for shard in range(3):
        samples = [tiny_sample(f"s{shard}-{n}", caption=text) for n, text in enumerate(texts[shard::3])]
        make.write_shard(tmp_path / "in" / f"{shard:06d}.tar", samples)
    refined = {"refine": {"rounds": 3, "min_captions": 20}}
    summary = run(tmp_path / "in", tmp_path / "out", workers=1, **refined)
    assert summary.blind is not None
    assert summary.blind.before["add attribute"].value > 0.9
    assert summary.kinds.get("add attribute", 0) < 20
    assert summary.dropped["blind"] > 0
    assert run(tmp_path / "in", tmp_path / "two", workers=2, **refined).kinds == summary.kinds
    written = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "two")]
    assert written[0] == written[1]
    tested = blind(BlindOptions(str(tmp_path / "out"), workers=1))
    assert {kind: one.pairs for kind, one in tested.kinds.items() if kind != "all"} == summary.kinds
