"""Ways to write, against brute force over a toy language, and against one another on a tiny captioner."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.generate import GenerateConfig, captions, methods, write
from diptych.generate.beam import beam
from diptych.generate.rules import Rules, contrasted
from diptych.generate.writer import Step
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_CAPTIONER, TINY_MODEL

START, END, WORDS = 0, 1, 6
CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Toy:
    """Two pictures; the next word depends on the picture, the last word, and how many there are."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(2, 8, WORDS, WORDS, generator=generator)
        self.features = torch.randn(WORDS, 4, generator=generator)
        self.num_captions, self.position = 2, 0
        self.pictures = torch.arange(2)

    def start(self) -> Step:
        return self.step(torch.full((self.num_captions,), START))

    def step(self, ids: Tensor) -> Step:
        assert len(ids) == self.num_captions
        logits = self.table[self.pictures, self.position, ids]
        self.position += 1
        return Step(self.features[ids], logits, None)

    def select(self, rows: Tensor) -> None:
        self.pictures = self.pictures[rows]
        assert self.pictures.equal(self.pictures.sort().values)
        self.num_captions = len(rows)


def rules(min_length: int = 0, max_length: int = 4) -> Rules:
    return Rules(END, min_length, max_length, (START,))


def log_probability(seed: int, picture: int, caption: tuple[int, ...]) -> float:
    """Of a caption of the toy; words that are no words keep their share of the probability."""
    table = Toy(seed).table[picture].log_softmax(-1)
    return sum(float(table[i, a, b]) for i, (a, b) in enumerate(itertools.pairwise((START, *caption))))


def all_captions(length: int) -> list[tuple[int, ...]]:
    """That end, or have no room to."""
    ended = [(*words, END) for count in range(length) for words in itertools.product(range(2, WORDS), repeat=count)]
    return ended + list(itertools.product(range(2, WORDS), repeat=length))


def cut(row: list[int]) -> tuple[int, ...]:
    return tuple(row[: row.index(END) + 1] if END in row else row)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.7, 1.0]))
def test_a_wide_beam_finds_the_best_caption(seed: int, penalty: float) -> None:
    found = beam(Toy(seed), rules(max_length=3), CPU, beams=200, length_penalty=penalty)
    for picture, row in enumerate(found.tolist()):
        values = {c: log_probability(seed, picture, c) / len(c) ** penalty for c in all_captions(3)}
        assert values[cut(row)] == pytest.approx(max(values.values()), abs=1e-5)


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_one_beam_and_no_penalty_are_greedy(seed: int, least: int) -> None:
    greedy = methods.greedy(Toy(seed), rules(least), CPU).tolist()
    assert beam(Toy(seed), rules(least), CPU, beams=1, length_penalty=1.0).tolist() == greedy
    assert methods.contrastive(Toy(seed), rules(least), CPU, candidates=3, penalty=0.0).tolist() == greedy
    nearly = methods.sample(Toy(seed), rules(least), torch.rand(2, 4), filters=(1.0, 1, 1.0))
    assert nearly.tolist() == greedy
    for row in greedy:
        assert START not in row
        assert END not in row[:least]


@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(2, 5))
def test_contrastive_search_is_its_formula(seed: int, penalty: float, k: int) -> None:
    found = methods.contrastive(Toy(seed), rules(), CPU, candidates=k, penalty=penalty).tolist()
    toy = Toy(seed)
    features = torch.nn.functional.normalize(toy.features, dim=1)
    for picture, row in enumerate(found):
        words = [START]
        while len(words) < 5 and words[-1] != END:
            p = toy.table[picture, len(words) - 1, words[-1]].softmax(0)
            p[START] = 0
            merit = {
                v: (1 - penalty) * float(p[v]) - penalty * float((features[words] @ features[v]).max())
                for v in p.topk(k).indices.tolist()
                if v != START
            }
            words.append(max(merit, key=lambda v: merit[v]))
        assert cut(row) == tuple(words[1:])


# --- sampling --------------------------------------------------------------------------------------------------------


def test_words_are_drawn_by_their_probability() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.45])
    draws = (torch.arange(2000) + 0.5) / 2000
    words = methods.drawn(probabilities.log().expand(2000, 4), draws, (1.0, 0, 1.0))
    torch.testing.assert_close(words.bincount(minlength=4) / 2000, probabilities, atol=1e-3, rtol=0)
    cold = methods.drawn(probabilities.log().expand(2000, 4), draws, (0.5, 0, 1.0))
    torch.testing.assert_close(
        cold.bincount(minlength=4) / 2000, probabilities**2 / (probabilities**2).sum(), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("filters", "left"),
    [((1.0, 2, 1.0), {1, 3}), ((1.0, 0, 0.8), {1, 3}), ((1.0, 0, 0.9), {0, 1, 3}), ((1.0, 1, 1e-6), {3})],
)
def test_unlikely_words_are_left_out(filters: tuple[float, int, float], left: set[int]) -> None:
    scores = torch.tensor([0.1, 0.4, 0.05, 0.45]).log().expand(1001, 4)
    draws = torch.linspace(0, 1, 1001)  # 1 itself is the worst that rounding could make of a draw
    assert set(methods.drawn(scores, draws, filters).tolist()) == left


def test_barred_words_are_never_drawn() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(501, 3)
    assert 1 not in methods.drawn(scores, torch.linspace(0, 1, 501), (3.0, 0, 1.0)).tolist()


def test_contrast_takes_what_the_upper_layers_add() -> None:
    late, early = torch.tensor([[0.5, 0.46, 0.04]]), torch.tensor([[0.6, 0.2, 0.001]])
    found = contrasted(late.log(), early.log()).exp()
    ratio = torch.tensor([0.5 / 0.6, 0.46 / 0.2, 0.0])  # the third is not plausible
    torch.testing.assert_close(found[0], ratio / ratio.sum())


def test_words_are_plausible_beside_those_that_may_stand_there() -> None:
    late, early = torch.tensor([[0.1, 0.0, 4.0, 9.0, 3.0, 2.5]]), torch.tensor([[0.0, 0.0, 4.0, 0.0, 1.0, 2.5]])
    scores = Rules(END, 0, 4, banned=(3,)).scores(Step(torch.zeros(1, 4), late, early), 0)
    assert scores.isfinite().tolist() == [
        [False, False, True, False, True, True]
    ]  # the fourth, by far the likeliest, is no word
    torch.testing.assert_close(scores[:, [2, 4, 5]], torch.tensor([[0.0, 2.0, 0.0]]).log_softmax(1))


# --- a captioner -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    model = dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def config(**keys: Any) -> GenerateConfig:
    return from_tree(GenerateConfig, {"max_length": 8} | keys)


METHODS: list[dict[str, Any]] = [
    {"method": "greedy"},
    {"method": "beam", "beams": 3},
    {"method": "sample", "top_k": 50, "top_p": 0.9},
    {"method": "contrastive"},
]


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["method"])
@pytest.mark.parametrize("layer", [None, 1])
def test_batches_change_nothing(model: DualEncoder, keys: dict[str, Any], layer: int | None) -> None:
    settings = config(**keys, layer_contrast=layer)
    together = captions(model, IMAGES, settings)
    assert together == captions(model, IMAGES, settings)
    assert together == [captions(model, IMAGES[i : i + 1], settings, first=i)[0] for i in range(5)]
    assert len(set(together)) > 1
    assert not any("<" in text for text in together)


def test_greedy_is_what_the_slow_twin_says(model: DualEncoder) -> None:
    ids = write(model, IMAGES, config(method="greedy", layer_contrast=None))
    tokens = torch.full((5, 1), 49406)
    for place in range(ids.shape[1]):
        with torch.no_grad():
            logits = model.next_word_logits(IMAGES, torch.cat([tokens, tokens[:, :1]], 1))[:, -1]
        logits[:, [0, 49406]] = -torch.inf
        assert logits.argmax(1).equal(ids[:, place])
        tokens = torch.cat([tokens, ids[:, place : place + 1]], 1)


def test_one_beam_and_no_penalty_are_greedy_here_too(model: DualEncoder) -> None:
    greedy = write(model, IMAGES, config(method="greedy"))
    assert write(model, IMAGES, config(method="beam", beams=1)).equal(greedy)
    assert write(model, IMAGES, config(method="contrastive", penalty=0)).equal(greedy)
    assert write(model, IMAGES, config(method="sample", top_k=1)).equal(greedy)


def test_another_seed_draws_other_words(model: DualEncoder) -> None:
    one, two = (captions(model, IMAGES, config(method="sample", seed=seed)) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["method"])
def test_captions_fit_into_the_context(model: DualEncoder, keys: dict[str, Any]) -> None:
    ids = write(model, IMAGES, config(**keys, min_length=28, max_length=30))
    assert ids.shape == (5, 15)  # of 16 places the first is the start's
    assert not ids.eq(49407).any()


def test_dual_encoders_write_nothing() -> None:
    plain = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0).eval()
    with pytest.raises(ConfigError, match="writes no captions"):
        captions(plain, IMAGES, config())


@pytest.mark.parametrize(
    "keys",
    [{"beams": 0}, {"min_length": 8}, {"top_p": 0.0}, {"penalty": 1.5}, {"temperature": 0.0}, {"layer_contrast": 0}],
)
def test_settings_that_mean_nothing_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**keys)
