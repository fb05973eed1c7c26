"""CIDEr-D, BLEU and ROUGE-L by hand, and as COCO's caption evaluation has them."""

import math
import random

import pytest
import torch

from diptych_eval import caption_scores
from diptych_eval.caption_words import Words, words

# What pycocoevalcap 1.2 says of these captions; its own small constants show in BLEU from the tenth figure on.
WRITTEN = ("a man riding a horse", "two dogs run in the snow", "a bus")
REFERENCES = (
    ("a man rides a brown horse", "the man is riding a horse on the beach"),
    ("two dogs play in the snow", "dogs playing", "two black dogs run in deep snow"),
    ("a red bus on a street",),
)
CIDER = (2.32081497038834, 2.7567870104137775, 1.245506528305039)
ROUGE = (0.7155425219941348, 0.8333333333333334, 0.45864661654135336)
BLEU = (0.6807123982186607, 0.6088476782105076, 0.47643251674435866, 0.0)

MANY_CIDER, MANY_ROUGE = 2.6999535718151155, 0.7888196207976026
MANY_BLEU = (0.88136762606624, 0.8244546093832386, 0.7816628033365536, 0.7490260345655344)


def split(texts: tuple[str, ...] | list[str]) -> list[Words]:
    return [words(text) for text in texts]


def many() -> tuple[list[str], list[list[str]]]:
    """300 captions of random words: right ones, spoilt ones, halves, and an empty one."""
    draw = random.Random(0)
    words_of = "a the man dog red on with in cat two sits runs big table ball green sky"
    vocabulary = words_of.split(" ")

    def caption() -> str:
        return " ".join(draw.choice(vocabulary) for _ in range(draw.randint(1, 12)))

    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(300)]
    written = []
    for some in references:
        kept = draw.choice(some).split()
        if draw.random() < 0.5:
            kept = [word if draw.random() < 0.7 else draw.choice(vocabulary) for word in kept]
        if draw.random() < 0.3:
            kept = kept[: max(1, len(kept) // 2)]
        written.append(" ".join(kept))
    written[5] = ""
    return written, references


def test_the_figures_are_cocos() -> None:
    written, references = split(WRITTEN), [split(some) for some in REFERENCES]
    # sums in another order: a few units in the last place of float64
    assert caption_scores.cider(written, references).tolist() == pytest.approx(CIDER, rel=1e-13)
    assert caption_scores.rouge_l(written, references).tolist() == pytest.approx(ROUGE, rel=1e-13)
    found = caption_scores.bleu(caption_scores.bleu_counts(written, references).sum(0))
    assert found.tolist() == pytest.approx(BLEU, rel=1e-9)


def test_the_figures_of_many_captions_are_cocos() -> None:
    texts, several = many()
    written, references = split(texts), [split(some) for some in several]
    assert caption_scores.cider(written, references).mean().item() == pytest.approx(MANY_CIDER, rel=1e-13)
    assert caption_scores.rouge_l(written, references).mean().item() == pytest.approx(MANY_ROUGE, rel=1e-13)
    found = caption_scores.bleu(caption_scores.bleu_counts(written, references).sum(0))
    assert found.tolist() == pytest.approx(MANY_BLEU, rel=1e-8)


def test_cider_by_hand() -> None:
    # of two pictures, "a" is in both, so it weighs nothing; all other words weigh log 2
    found = caption_scores.cider(split(["a dog", "cat"]), [split(["a dog"]), split(["a cat"])])
    # "a dog" agrees in words and pairs, and has no longer n-grams; "cat" in words alone, being a word too short
    assert found.tolist() == pytest.approx([10 * 2 / 4, 10 * math.exp(-1 / 72) / 4])
    # a word written twice counts as often as the reference has it: 1 · 1 / (2 · 1)
    (repeated, _) = caption_scores.cider(split(["dog dog", "x"]), [split(["dog"]), split(["y"])]).tolist()
    assert repeated == pytest.approx(10 * 0.5 * math.exp(-1 / 72) / 4)


def test_of_one_picture_no_word_says_anything() -> None:
    assert caption_scores.cider(split(["a dog"]), [split(["a dog"])]).tolist() == [0.0]


def test_bleu_by_hand() -> None:
    counts = caption_scores.bleu_counts(split(["the the the cat"]), [split(["the cat sat", "on the the mat today"])])
    # two of three "the" are in the second reference; "the cat" in the first, "the the" once in the second;
    # both references are one word away: the shorter counts
    assert counts.tolist() == [[3, 2, 0, 0, 4, 3, 2, 1, 4, 3]]
    assert caption_scores.bleu(counts[0]).tolist() == pytest.approx([3 / 4, math.sqrt(3 / 4 * 2 / 3), 0, 0])
    short = caption_scores.bleu_counts(split(["a red bus"]), [split(["a red bus drives on"])])[0]
    assert caption_scores.bleu(short)[:3].tolist() == pytest.approx([math.exp(1 - 5 / 3)] * 3)
    assert caption_scores.bleu(torch.stack([counts[0], short])).shape == (2, 4)


def test_rouge_by_hand() -> None:
    (found,) = caption_scores.rouge_l(split(["a b c d"]), [split(["a x c", "d"])]).tolist()
    precision, recall = 2 / 4, 1.0  # "a c" of the first, all of the second
    assert found == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_nothing_written_is_worth_nothing() -> None:
    written, references = split(["", "?"]), [split(["a dog"]), split(["a cat"])]
    assert caption_scores.cider(written, references).tolist() == [0, 0]
    assert caption_scores.rouge_l(written, references).tolist() == [0, 0]
    assert caption_scores.bleu(caption_scores.bleu_counts(written, references).sum(0)).tolist() == [0, 0, 0, 0]


# The left sides as Stanford's PTBTokenizer 3.4.1 and COCO's list of punctuation cut them.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's red T-shirt, and the dogs' tails.", "a man 's red t-shirt and the dogs tails"),
        ("don't cannot won't I'm we've they'll he'd", "do n't can not wo n't i 'm we 've they 'll he 'd"),
        ('"quoted" (paren) 50% of $1,000 & U.S.', "quoted ( paren ) 50 % of $ 1,000 & u.s."),
        ("Mr. Smith’s 3.5 x 10:30; 10-year-old", "mr. smith 's 3.5 x 10:30 10-year-old"),
        ("two of -- three... fast / slow and/or wanna", "two of three fast / slow and/or wan na"),
        ("what?! no!!! yes! a,b 1,2 o'clock", "what ?! no !!! yes a b 1,2 o'clock"),
    ],
)
def test_words_are_cocos(text: str, expected: str) -> None:
    assert words(text) == tuple(expected.split())


def test_words_of_other_scripts() -> None:
    assert words("Ein großer Hund – und eine Kätzchen.") == ("ein", "großer", "hund", "und", "eine", "kätzchen")
    assert words("दो कुत्ते।") == ("दो", "कुत्ते")
    assert words("一只狗，雪") == ("一", "只", "狗", "雪")
    assert words(" ") == ()
