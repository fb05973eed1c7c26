# ruff: noqa: B023 - oracles of a step are used within it
"""Every plug against a dense float64 loss written as its paper writes it: values, and gradients of everything."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.config import from_tree
from diptych.distributed.groups import ALONE
from diptych.errors import ConfigError
from diptych.losses import tiles
from diptych.losses.batch import Moment, Pairs
from diptych.losses.contrastive import ContrastiveLoss, contrastive_loss
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.losses.plugs.candidates.mochi import Mochi
from diptych.losses.plugs.weights.clusters import kmeans
from diptych.losses.plugs.weights.inverse_propensity import surface_features
from diptych.losses.settings import ContrastiveConfig
from diptych.seeding import generator

INF = math.inf
Loss = Callable[["Inputs"], Tensor]


def unit(*shape: int, seed: int) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


@dataclass
class Inputs:
    """A batch, every tensor of which is differentiated where it can be."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    hard: Tensor
    ids: Tensor
    labels: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    temperatures: Tensor
    surface: Tensor
    positive: Tensor
    counter_image: Tensor
    counter_text: Tensor
    hard_ids: Tensor
    counter_ids: Tensor
    moment: Moment = field(default_factory=lambda: Moment(step=3, samples_seen=1000, seed=5))

    @property
    def leaves(self) -> list[Tensor]:
        more = [self.hard, self.positive, self.counter_image, self.counter_text]
        return [self.image, self.text, self.scale, self.bias, self.temperatures, *more]

    @property
    def present(self) -> Tensor:
        return self.counter_ids % 3 > 0

    def pairs(self) -> Pairs:
        known = {
            "caption_ids": self.ids,
            "sample_ids": torch.arange(len(self.ids)),
            "labels": self.ids,
            "label_features": self.labels,
            "temperatures": self.temperatures,
            "surface_features": self.surface,
            "sample_weights": self.surface[:, 0] + 1,
            "hard_ids": self.hard_ids,
            "counter_ids": self.counter_ids,
            "counter_present": self.present,
        }
        return Pairs(
            self.image,
            self.text,
            self.scale,
            self.bias,
            known,
            {"teacher_features": self.teacher_image},
            {"teacher_features": self.teacher_text},
            self.hard,
            self.positive,
            counter_images=self.counter_image,
            counter_texts=self.counter_text,
        )


def inputs(rows: int, width: int = 12, *, scale: float = 14.0, seed: int = 0) -> Inputs:
    tokens = torch.randint(0, 9, (rows, 7), generator=torch.Generator().manual_seed(seed))
    numbers = torch.Generator().manual_seed(seed + 11)
    made = Inputs(
        image=unit(rows, width, seed=seed + 1),
        text=unit(rows, width, seed=seed + 2),
        scale=torch.tensor(scale, dtype=torch.float64),
        bias=torch.tensor(-3.0, dtype=torch.float64),
        hard=unit(rows, 2, width, seed=seed + 3),
        ids=torch.randint(0, max(rows // 2, 1), (rows,), generator=torch.Generator().manual_seed(seed + 4)),
        labels=unit(rows, 5, seed=seed + 5),
        teacher_image=unit(rows, width, seed=seed + 6),
        teacher_text=unit(rows, width, seed=seed + 7),
        temperatures=torch.linspace(0.05, 0.3, rows, dtype=torch.float64),
        surface=surface_features(tokens, width=32).double(),
        positive=unit(rows, 3, width, seed=seed + 8),
        counter_image=unit(rows, width, seed=seed + 9),
        counter_text=unit(rows, width, seed=seed + 10),
        hard_ids=torch.randint(0, rows, (rows, 2), generator=numbers),
        counter_ids=torch.randint(0, rows, (rows,), generator=numbers),
    )
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


# --- the oracle --------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """log Σ w exp(z) − Σ π z of every row; 0 where a row has no candidate at all."""
    energy = logits if log_weights is None else logits + log_weights
    some = ~(energy == -INF).all(1)
    losses = torch.zeros(len(logits), dtype=logits.dtype)
    return losses.index_put((some.nonzero()[:, 0],), energy[some].logsumexp(1) - (targets * logits).sum(1)[some])


def both(data: Inputs, direction: Callable[[Tensor, Tensor, str], Tensor]) -> Tensor:
    """The mean of both directions' mean anchor losses."""
    return (direction(data.image, data.text, "image").mean() + direction(data.text, data.image, "text").mean()) / 2


def eye(data: Inputs) -> Tensor:
    return torch.eye(len(data.image), dtype=torch.float64)


def own(data: Inputs) -> Tensor:
    return eye(data).bool()


def same(data: Inputs) -> Tensor:
    return data.ids[:, None] == data.ids[None, :]


def clip(data: Inputs) -> Tensor:
    return both(data, lambda a, c, _: cross_entropy(data.scale * a @ c.T, eye(data)))


def targets_of(function: Callable[[Inputs, Tensor, Tensor, str], Tensor]) -> Loss:
    return lambda data: both(data, lambda a, c, m: cross_entropy(data.scale * a @ c.T, function(data, a, c, m)))


def weights_of(function: Callable[[Inputs, Tensor], Tensor]) -> Loss:
    return lambda data: both(
        data, lambda a, c, _: cross_entropy(data.scale * a @ c.T, eye(data), function(data, a @ c.T))
    )


def rows_normalised(matrix: Tensor) -> Tensor:
    return matrix / matrix.sum(1, keepdim=True)


def cwcl(data: Inputs, anchor: Tensor, candidate: Tensor, modality: str) -> Tensor:
    frozen = data.image.detach()
    return rows_normalised((frozen @ frozen.T + 1) / 2) if modality == "text" else eye(data)


def momentum(data: Inputs, anchor: Tensor, candidate: Tensor, modality: str) -> Tensor:
    pair = (data.teacher_image, data.teacher_text)
    mine, theirs = pair if modality == "image" else pair[::-1]
    return 0.4 * torch.softmax(data.scale.detach() * mine @ theirs.T, 1) + 0.6 * eye(data)


def weighted_positive(data: Inputs, *_: Any) -> Tensor:
    powers = torch.exp((data.image * data.text).sum(1).detach() / 0.5)
    return torch.diag(2 - powers / powers.mean())


def dropped(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -INF)


def repulsion(stop: bool) -> Callable[[Inputs, Tensor], Tensor]:
    def function(data: Inputs, x: Tensor) -> Tensor:
        nearness = torch.exp(-2.0 * (2 - 2 * x))
        others = nearness.masked_fill(own(data), 0.0)
        weight = nearness / (others.sum(1, keepdim=True) / max(len(x) - 1, 1))
        return torch.where(own(data), 0.0, (weight.detach() if stop else weight).log())

    return function


def false_negatives(margin: float, keep: int | None) -> Callable[[Inputs, Tensor], Tensor]:
    def function(data: Inputs, x: Tensor) -> Tensor:
        x = x.detach()
        allowed = (x <= x.diag()[:, None] + margin) & ~own(data)
        if keep is not None:
            ranks = x.masked_fill(~allowed, -INF).argsort(1, descending=True).argsort(1)
            allowed &= ranks < keep
        return dropped(~(allowed | own(data)))

    return function


def clusters(data: Inputs, x: Tensor) -> Tensor:
    found = [kmeans(data.image.detach(), number, 10) for number in (2, 3)]
    shared = sum((labels[:, None] == labels[None, :]).double() for labels in found)
    return torch.log(1 - shared / 2)


def propensity(data: Inputs, x: Tensor) -> Tensor:
    likely = 0.5 * data.surface @ data.surface.T + 0.5 * (1 + x.detach()) / 2
    return torch.where(own(data), 0.0, (1 / likely.clamp(0.1, 1)).log())


def smoothed(data: Inputs) -> Tensor:
    return both(data, lambda a, c, _: F.cross_entropy(
        data.scale * a @ c.T, torch.arange(len(a)), reduction="none", label_smoothing=0.2))  # fmt: skip


def siglip(targets: Callable[[Inputs], Tensor]) -> Loss:
    def function(data: Inputs) -> Tensor:
        logits = data.scale * data.image @ data.text.T + data.bias
        loss = F.binary_cross_entropy_with_logits(logits, targets(data), reduction="none")
        return loss.sum() / len(logits)

    return function


def decoupled_softmax(data: Inputs) -> Tensor:
    def direction(a: Tensor, c: Tensor, _: str) -> Tensor:
        logits, right = data.scale * a @ c.T, same(data) | own(data)
        losses = []
        for i in range(len(a)):
            negative = logits[i][~right[i]]
            each = [
                torch.cat([logits[i, p : p + 1], negative]).logsumexp(0) - logits[i, p]
                for p in right[i].nonzero()[:, 0]
            ]
            losses.append(torch.stack(each).mean())
        return torch.stack(losses)

    return both(data, direction)


def soft_topk(data: Inputs) -> Tensor:
    """The threshold by Newton steps that autograd follows, from a solution found without gradient."""

    def direction(a: Tensor, c: Tensor, _: str) -> Tensor:
        logits, right = data.scale * a @ c.T, same(data) | own(data)
        low, high = -logits.detach().amax(1) - 20, -logits.detach().amin(1) + 20
        for _ in range(200):
            middle = (low + high) / 2
            below = torch.sigmoid(2 * (logits.detach() + middle[:, None])).sum(1) < 2
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        threshold = (low + high) / 2
        for _ in range(3):
            q = torch.sigmoid(2 * (logits + threshold[:, None]))
            threshold = threshold + (2 - q.sum(1)) / (2 * q * (1 - q)).sum(1)
        q = torch.sigmoid(2 * (logits + threshold[:, None]))
        return -(rows_normalised(right.double()) * q.log()).sum(1)

    return both(data, direction)


def with_columns(local: bool) -> Loss:
    def function(data: Inputs) -> Tensor:
        size = len(data.image)
        logits = data.scale * data.image @ data.text.T
        if local:
            extra = data.scale * torch.einsum("bd,bkd->bk", data.image, data.hard)
        else:
            extra = data.scale * data.image @ data.hard.flatten(0, 1).T
        image = F.cross_entropy(torch.cat([logits, extra], 1), torch.arange(size))
        return (image + F.cross_entropy(logits.T, torch.arange(size))) / 2

    return function


def hard_that_are_right(data: Inputs) -> Tensor:
    texts, ids = torch.cat([data.text, data.hard.flatten(0, 1)]), torch.cat([data.ids, data.hard_ids.flatten()])
    image = cross_entropy(
        data.scale * data.image @ texts.T, rows_normalised((data.ids[:, None] == ids[None, :]).double())
    )
    text = cross_entropy(data.scale * data.text @ data.image.T, rows_normalised(same(data).double()))
    return (image.mean() + text.mean()) / 2


def hard_left_out(data: Inputs) -> Tensor:
    size = len(data.image)
    texts, ids = torch.cat([data.text, data.hard.flatten(0, 1)]), torch.cat([data.ids, data.hard_ids.flatten()])
    equal = (data.ids[:, None] == ids[None, :]) & ~torch.eye(size, len(ids), dtype=torch.bool)
    image = cross_entropy(data.scale * data.image @ texts.T, torch.eye(size, len(ids)).double(), dropped(equal))
    text = cross_entropy(data.scale * data.text @ data.image.T, eye(data), dropped(same(data) & ~own(data)))
    return (image.mean() + text.mean()) / 2


def counter_pairs(repeated: bool) -> Loss:
    """Only those that are there, put behind the batch."""

    def function(data: Inputs) -> Tensor:
        def direction(a: Tensor, c: Tensor, modality: str) -> Tensor:
            counters = data.counter_text if modality == "image" else data.counter_image
            candidates = torch.cat([c, counters[data.present]])
            ids = torch.cat([data.ids, data.counter_ids[data.present]])
            right = torch.eye(len(a), len(ids), dtype=torch.float64)
            if repeated:
                right = rows_normalised((data.ids[:, None] == ids[None, :]).double())
            return cross_entropy(data.scale * a @ candidates.T, right)

        return both(data, direction)

    return function


def several_right(with_hard: bool, repeated: bool) -> Loss:
    def function(data: Inputs) -> Tensor:
        targets = same(data).double() if repeated else eye(data)
        own_texts = torch.cat([data.positive, data.hard], 1) if with_hard else data.positive
        logits = torch.cat([data.image @ data.text.T, torch.einsum("bd,bkd->bk", data.image, own_texts)], 1)
        right = torch.zeros(own_texts.shape[:2], dtype=torch.float64)
        right[:, :3] = 1
        image = cross_entropy(data.scale * logits, rows_normalised(torch.cat([targets, right], 1)))
        text = cross_entropy(data.scale * data.text @ data.image.T, rows_normalised(targets))
        return (image.mean() + text.mean()) / 2

    return function


def per_anchor(data: Inputs) -> Tensor:
    return both(data, lambda a, c, _: cross_entropy(a @ c.T / data.temperatures[:, None], eye(data)))


def heads(data: Inputs, number: int) -> Tensor:
    losses = []
    for image, text in zip(data.image.chunk(number, 1), data.text.chunk(number, 1), strict=True):
        logits = data.scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        losses += [cross_entropy(logits, eye(data)).mean(), cross_entropy(logits.T, eye(data)).mean()]
    return torch.stack(losses).mean()


def extrapolated(data: Inputs) -> Tensor:
    rate = 1 + generator(5, "extrapolated", 3).beta(2.0, 2.0)
    harder_image = rate * data.image + (1 - rate) * data.text
    harder_text = rate * data.text + (1 - rate) * data.image
    x = torch.where(own(data), (harder_image * harder_text).sum(1)[:, None], data.image @ data.text.T)
    logits = data.scale * x
    return (cross_entropy(logits, eye(data)).mean() + cross_entropy(logits.T, eye(data)).mean()) / 2


def interpolated(data: Inputs) -> Tensor:
    size = len(data.image)
    rng = generator(5, "interpolated", 3)
    share, distance = float(rng.beta(1.6, 1.6)), int(rng.integers(1, size))

    def direction(a: Tensor, c: Tensor, _: str) -> Tensor:
        mixture = F.normalize(share * c + (1 - share) * c.roll(-distance, 0), dim=1).detach()
        place = torch.arange(size)
        contains = (place[:, None] == place[None, :]) | (place[:, None] == place.roll(-distance)[None, :])
        extra = (data.scale * a @ mixture.T).masked_fill(contains, -INF)
        return F.cross_entropy(torch.cat([data.scale * a @ c.T, extra], 1), place, reduction="none")

    return both(data, direction)


def loss_based(data: Inputs) -> Tensor:
    def direction(a: Tensor, c: Tensor, _: str) -> Tensor:
        losses = cross_entropy(data.scale * a @ c.T, eye(data))
        plain = losses.detach()
        h = (2 * plain - plain.max() - plain.min()) / (plain.max() - plain.min()).clamp(min=1e-6)
        return len(a) * torch.softmax((h + 1).clamp(max=1) / 0.5, 0) * losses

    return both(data, direction)


def given_weights(data: Inputs) -> Tensor:
    return both(data, lambda a, c, _: (data.surface[:, 0] + 1) * cross_entropy(data.scale * a @ c.T, eye(data)))


def queue_alone(data: Inputs) -> Tensor:
    def direction(a: Tensor, c: Tensor, modality: str) -> Tensor:
        teacher = data.teacher_text if modality == "image" else data.teacher_image
        return cross_entropy(data.scale * a @ teacher.T, eye(data))

    return both(data, direction)


CASES: dict[str, tuple[dict[str, Any], Loss]] = {
    "clip": ({}, clip),
    "label smoothing": ({"label_smoothing": 0.2}, smoothed),
    "same caption": ({"targets": "same_caption"}, targets_of(lambda d, *_: rows_normalised(same(d).double()))),
    "same label": ({"targets": "same_label"}, targets_of(lambda d, *_: rows_normalised(same(d).double()))),
    "cwcl": ({"targets": "cwcl"}, targets_of(cwcl)),
    "soft labels": (
        {"targets": {"type": "soft_labels", "temperature": 0.3}},
        targets_of(lambda d, *_: torch.softmax(d.labels @ d.labels.T / 0.3, 1)),
    ),
    "momentum": ({"targets": "momentum"}, targets_of(momentum)),
    "decoupled": ({"weights": ["decoupled"]}, weights_of(lambda d, x: dropped(own(d)))),
    "weighted decoupled": (
        {"weights": ["decoupled"], "targets": "weighted_positive"},
        lambda data: both(
            data,
            lambda a, c, m: cross_entropy(data.scale * a @ c.T, weighted_positive(data, a, c, m), dropped(own(data))),
        ),
    ),
    "not same caption": (
        {"weights": ["not_same_caption"]},
        weights_of(lambda d, x: dropped(same(d) & ~own(d))),
    ),
    "repulsion": ({"weights": ["repulsion"]}, weights_of(repulsion(stop=False))),
    "repulsion, constant": (
        {"weights": [{"type": "repulsion", "stop_gradient": True}]},
        weights_of(repulsion(stop=True)),
    ),
    "false negatives": ({"weights": ["false_negatives"]}, weights_of(false_negatives(0.1, None))),
    "unime": ({"weights": [{"type": "false_negatives", "keep": 3}]}, weights_of(false_negatives(0.1, 3))),
    "hardest": ({"weights": [{"type": "hardest", "keep": 2}]}, weights_of(false_negatives(INF, 2))),
    "clusters": ({"weights": [{"type": "clusters", "numbers": [2, 3]}]}, weights_of(clusters)),
    "inverse propensity": ({"weights": ["inverse_propensity"]}, weights_of(propensity)),
    "two weights": (
        {"weights": ["decoupled", "inverse_propensity"]},
        weights_of(lambda d, x: dropped(own(d)) + propensity(d, x)),
    ),
    "sigmoid": ({"normaliser": "sigmoid"}, siglip(eye)),
    "sigmoid, same caption": (
        {"normaliser": "sigmoid", "targets": "same_caption"},
        siglip(lambda d: same(d).double()),
    ),
    "decoupled softmax": ({"normaliser": "decoupled_softmax", "targets": "same_caption"}, decoupled_softmax),
    "soft top-k": ({"normaliser": {"type": "soft_topk", "k": 2}, "targets": "same_caption"}, soft_topk),
    "hard captions": ({"candidates": ["hard_captions"]}, with_columns(local=False)),
    "own hard captions": ({"candidates": ["own_hard_captions"]}, with_columns(local=True)),
    "hard captions that are right elsewhere": (
        {"candidates": ["hard_captions"], "targets": "same_caption"},
        hard_that_are_right,
    ),
    "hard captions that are left out elsewhere": (
        {"candidates": ["hard_captions"], "weights": ["not_same_caption"]},
        hard_left_out,
    ),
    "counter pairs": ({"candidates": ["counter_pairs"]}, counter_pairs(repeated=False)),
    "counter pairs, same caption": (
        {"candidates": ["counter_pairs"], "targets": "same_caption"},
        counter_pairs(repeated=True),
    ),
    "positive captions": ({"candidates": ["positive_captions"]}, several_right(with_hard=False, repeated=False)),
    "positive and own hard captions": (
        {"candidates": ["own_hard_captions", "positive_captions"], "targets": "same_caption"},
        several_right(with_hard=True, repeated=True),
    ),
    "per anchor": ({"temperature": "per_anchor"}, per_anchor),
    "fixed": (
        {"temperature": {"type": "fixed", "temperature": 0.1}},
        lambda data: both(data, lambda a, c, _: cross_entropy(a @ c.T / 0.1, eye(data))),
    ),
    "interpolated": ({"candidates": ["interpolated"]}, interpolated),
    "loss based": ({"sample_weight": {"type": "loss_based", "temperature": 0.5}}, loss_based),
    "given weights": ({"sample_weight": "given"}, given_weights),
    "teacher's candidates": ({"candidates": [{"type": "queue", "size": 0}]}, queue_alone),
    "same captions, smoothed, weighted": (
        {"targets": "same_caption", "label_smoothing": 0.2, "weights": ["inverse_propensity"]},
        lambda data: both(
            data,
            lambda a, c, _: cross_entropy(
                data.scale * a @ c.T,
                0.8 * rows_normalised(same(data).double()) + 0.2 / len(a),
                propensity(data, a @ c.T),
            ),
        ),
    ),
}


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROW_BLOCK", 4)
    monkeypatch.setattr(tiles, "COLUMN_BLOCK", 5)


def compare(found: Tensor, expected: Tensor, leaves: list[Tensor], *, atol: float = 1e-9) -> None:
    """Values, and gradients of every leaf; a leaf that neither uses is the same to both."""
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=atol)
    used = [leaf for leaf in leaves if leaf.requires_grad]
    mine = torch.autograd.grad(found, used, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(expected, used, allow_unused=True, retain_graph=True)
    for left, right, leaf in zip(mine, theirs, used, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if left is None else left, zero if right is None else right, atol=atol, rtol=atol
        )


def loss_of(options: dict[str, Any], data: Inputs) -> Tensor:
    config = from_tree(ContrastiveConfig, options)
    return ContrastiveLoss(config, embed_dim=data.image.shape[1])(data.pairs(), ALONE, data.moment)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0, 400.0])
@pytest.mark.parametrize("name", CASES)
def test_plugs_equal_their_papers(name: str, scale: float) -> None:
    options, oracle = CASES[name]
    if name == "soft top-k" and scale > 20:
        scale = 20.0  # beyond it the operator is a step, and the oracle's Newton steps leave it
    for rows in (3, 5, 11):
        data = inputs(rows, scale=scale, seed=rows)
        compare(loss_of(options, data), oracle(data), data.leaves, atol=1e-8)


def drawn_case_is_its_papers(case: tuple[str, int, float, bool, int, int, int]) -> None:
    name, rows, scale, repeated, seed, height, width = case
    options, oracle = CASES[name]
    data = inputs(rows, scale=min(scale, 20.0) if name == "soft top-k" else scale, seed=seed)
    # Ties are decided by rounding there: which of two equal ones is kept, how far two equal losses lie apart.
    if repeated and name not in ("unime", "hardest", "loss based"):
        for side in ("image", "text"):
            setattr(data, side, getattr(data, side).detach()[torch.arange(rows) // 2].requires_grad_())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROW_BLOCK", height)
        patch.setattr(tiles, "COLUMN_BLOCK", width)
        compare(loss_of(options, data), oracle(data), data.leaves, atol=1e-8)


ANY_CASE = st.tuples(
    st.sampled_from([name for name in CASES if name not in ("soft top-k", "interpolated")]),
    st.integers(2, 13),
    st.sampled_from([0.1, 1.0, 14.0, 100.0, 1000.0]),
    st.booleans(),
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 6),
)


@given(ANY_CASE)
@settings(max_examples=150, deadline=None)
def test_any_plug_with_any_shape_tile_and_scale(case: tuple[str, int, float, bool, int, int, int]) -> None:
    drawn_case_is_its_papers(case)


@pytest.mark.slow
@given(ANY_CASE)
@settings(max_examples=5000, deadline=None)
def test_any_plug_at_length(case: tuple[str, int, float, bool, int, int, int]) -> None:
    drawn_case_is_its_papers(case)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one_has_a_finite_loss(name: str) -> None:
    options, _ = CASES[name]
    data = inputs(1)
    if name == "soft top-k":
        with pytest.raises(ConfigError, match="below the number of candidates"):
            loss_of(options, data)
        return
    loss = loss_of(options, data)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, data.leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_features_are_summed_in_float32(name: str) -> None:
    options, oracle = CASES[name]
    data = inputs(9)
    coarse = data.pairs()
    half = Pairs(
        data.image.bfloat16(), data.text.bfloat16(), data.scale.float(), data.bias.float(),
        {key: value.float() if value.is_floating_point() else value for key, value in coarse.known.items()},
        {key: value.float() for key, value in coarse.image_known.items()},
        {key: value.float() for key, value in coarse.text_known.items()},
        data.hard.bfloat16(), data.positive.bfloat16(),
        counter_images=data.counter_image.bfloat16(), counter_texts=data.counter_text.bfloat16(),
    )  # fmt: skip
    rounded = inputs(9)
    for name_of in ("image", "text", "hard", "positive", "counter_image", "counter_text"):
        setattr(rounded, name_of, getattr(rounded, name_of).detach().bfloat16().double())
    config = from_tree(ContrastiveConfig, options)
    found = ContrastiveLoss(config, embed_dim=12)(half, ALONE, data.moment)
    assert found.dtype == torch.float32
    # Rounded inputs are the oracle's too; what is left is float32's error of logits up to 14.
    torch.testing.assert_close(found.double(), oracle(rounded), atol=3e-5, rtol=1e-4)


# --- limits that the papers name ---------------------------------------------------------------------------------


LIMITS: dict[str, dict[str, Any]] = {
    "cwcl sharpened": {"targets": {"type": "cwcl", "sharpness": 1e-3}},
    "momentum without teacher": {"targets": {"type": "momentum", "share": 0.0}},
    "repulsion t = 0": {"weights": [{"type": "repulsion", "t": 0.0}]},
    "no false negatives": {"weights": [{"type": "false_negatives", "margin": 3.0}]},
    "all are hardest": {"weights": [{"type": "hardest", "keep": 100}]},
    "propensity 1": {"weights": [{"type": "inverse_propensity", "floor": 1.0}]},
    "no synthetic negatives": {"candidates": [{"type": "mochi", "mixed": 0, "queried": 0}]},
    "no extrapolation": {"similarity": {"type": "extrapolated", "alpha": 0.0}},
    "uniform preference": {"sample_weight": {"type": "loss_based", "temperature": 1e12}},
    "weighted positive, flat": {"targets": {"type": "weighted_positive", "sigma": 1e12}},
    "one positive each": {"normaliser": "decoupled_softmax"},
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_clip(name: str) -> None:
    data = inputs(8)
    atol = 1e-6 if name in ("uniform preference", "cwcl sharpened") else 1e-9
    compare(loss_of(LIMITS[name], data), clip(data), data.leaves, atol=atol)


def test_distinct_captions_are_clip() -> None:
    data = inputs(8)
    data.ids = torch.arange(8)
    for options in ({"targets": "same_caption"}, {"targets": "same_label"}, {"weights": ["not_same_caption"]}):
        compare(loss_of(options, data), clip(data), data.leaves)


def test_soft_labels_become_equal_labels() -> None:
    data = inputs(8)
    data.labels = F.one_hot(data.ids, 8).double()
    soft = loss_of({"targets": {"type": "soft_labels", "temperature": 1e-3}}, data)
    compare(soft, loss_of({"targets": "same_label"}, data), data.leaves)


def test_decoupled_gradient_has_no_factor_of_the_positive() -> None:
    """The gradient towards negatives is their softmax among negatives, without the factor 1 − p_ii."""
    data = inputs(6)
    logits = (data.scale * data.image @ data.text.T).detach()
    (found,) = torch.autograd.grad(loss_of({"weights": ["decoupled"]}, data), data.image)
    towards_text = torch.softmax(logits.masked_fill(own(data), -INF), 1) - eye(data)
    towards_image = torch.softmax(logits.T.masked_fill(own(data), -INF), 1).T - eye(data)
    expected = data.scale * (towards_text + towards_image) @ data.text / (2 * 6)
    torch.testing.assert_close(found, expected.detach())


# --- plugs with a state or draws ---------------------------------------------------------------------------------


def test_mochi_points_are_mixtures_of_the_hardest() -> None:
    data = inputs(10)
    config = from_tree(ContrastiveConfig, {"candidates": [{"type": "mochi", "hardest": 3, "mixed": 4, "queried": 2}]})
    loss = ContrastiveLoss(config, embed_dim=12)
    grid = loss._layouts(data.pairs(), ALONE)[0].grid
    plug = config.candidates[0]
    assert isinstance(plug, Mochi)
    extra = {}
    for direction, anchors, candidates in (("rows", data.image, data.text), ("columns", data.text, data.image)):
        points = plug.points(grid, direction, data.moment)
        assert points is not None
        assert torch.equal(points, plug.points(grid, direction, data.moment))
        assert not torch.equal(points, plug.points(grid, direction, Moment(step=4, samples_seen=1000, seed=5)))
        hardest = (anchors @ candidates.T).masked_fill(own(data), -INF).topk(3, 1).indices
        for i in range(10):
            basis = candidates[hardest[i]].detach()
            basis = torch.cat([basis, anchors[i : i + 1].detach()])
            solution = torch.linalg.lstsq(basis.T, points[i].T).solution
            torch.testing.assert_close(basis.T @ solution, points[i].T, atol=1e-9, rtol=1e-9)
            assert (solution > -1e-9).all()
            assert (solution[3, :4].abs() < 1e-9).all()  # the first four hold no part of the anchor
            towards = solution[3, 4:] / solution[:, 4:].sum(0)
            assert ((towards >= -1e-9) & (towards <= 0.5)).all()
        extra[direction] = points
    expected = both(
        data,
        lambda a, c, m: F.cross_entropy(
            data.scale
            * torch.cat([a @ c.T, torch.einsum("bd,bkd->bk", a, extra["rows" if m == "image" else "columns"])], 1),
            torch.arange(10),
            reduction="none",
        ),
    )
    compare(loss(data.pairs(), ALONE, data.moment), expected, data.leaves)


def test_queue_holds_earlier_batches_and_never_the_own_sample() -> None:
    config = from_tree(ContrastiveConfig, {"candidates": [{"type": "queue", "size": 7}], "targets": "momentum"})
    loss = ContrastiveLoss(config, embed_dim=12).double()
    queue_image, queue_text, queue_ids = unit(0, 12, seed=0), unit(0, 12, seed=0), torch.zeros(0, dtype=torch.long)
    for step in range(4):
        data = inputs(5, seed=10 * step)
        pairs = data.pairs()
        pairs.known["sample_ids"] = torch.arange(5) + 3 * step  # samples come again while the queue holds them
        ids = pairs.known["sample_ids"]
        skipped = torch.cat([torch.zeros(5, 5, dtype=torch.bool), ids[:, None] == queue_ids[None, :]], 1)

        def direction(a: Tensor, c: Tensor, modality: str) -> Tensor:
            mine = data.teacher_image if modality == "image" else data.teacher_text
            if modality == "image":
                theirs = torch.cat([data.teacher_text, queue_text])
            else:
                theirs = torch.cat([data.teacher_image, queue_image])
            wide = torch.eye(5, len(theirs), dtype=torch.float64)
            soft = torch.softmax((data.scale.detach() * mine @ theirs.T).masked_fill(skipped, -INF), 1)
            target = 0.4 * soft + 0.6 * wide
            assert torch.allclose(target.sum(1), torch.ones(5, dtype=torch.float64))
            return cross_entropy(data.scale * a @ theirs.T, target, dropped(skipped))

        compare(loss(pairs, ALONE, data.moment), both(data, direction), data.leaves)
        loss.after_step(pairs)
        queue_image = torch.cat([queue_image, data.teacher_image])[-7:]
        queue_text = torch.cat([queue_text, data.teacher_text])[-7:]
        queue_ids = torch.cat([queue_ids, ids])[-7:]
        restored = ContrastiveLoss(config, embed_dim=12).double()
        restored.load_state_dict(loss.state_dict())
        loss = restored


def behind_normalisation(rows: int) -> tuple[Inputs, list[Tensor]]:
    """Features of unit norm as a model gives them, and what it normalised: the part of a gradient along a feature,
    in which two ways to write a formula may differ, does not pass."""
    data = inputs(rows)
    raw = [(3 * leaf.detach()).requires_grad_() for leaf in (data.image, data.text)]
    data.image, data.text = (F.normalize(leaf, dim=1) for leaf in raw)
    return data, [*raw, data.scale]


def test_extrapolated_positives_are_those_of_explicit_vectors() -> None:
    data, leaves = behind_normalisation(7)
    compare(loss_of({"similarity": "extrapolated"}, data), extrapolated(data), leaves)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("number", [1, 3, 4])
def test_heads_are_losses_of_their_parts(number: int) -> None:
    data, leaves = behind_normalisation(7)
    found = loss_of({"similarity": {"type": "heads", "heads_count": number}}, data)
    compare(found, heads(data, number), leaves)
    if number == 1:
        compare(found, clip(data), leaves)


def test_sogclr_averages_denominators_over_steps() -> None:
    options = {"denominator": {"type": "sogclr", "num_samples": 8, "gamma": 0.7}}
    loss = ContrastiveLoss(from_tree(ContrastiveConfig, options), embed_dim=12).double()
    remembered: dict[tuple[str, int], Tensor] = {}
    for step in range(4):
        data = inputs(5, seed=step)
        pairs = data.pairs()
        ids = (torch.arange(5) + 2 * step) % 8
        pairs.known["sample_ids"] = ids

        def direction(a: Tensor, c: Tensor, modality: str) -> Tensor:
            h = a @ c.T - (a * c).sum(1, keepdim=True)
            tau = 1 / data.scale.detach()
            powers = torch.exp(h / tau).masked_fill(own(data), 0)
            losses = []
            for i in range(5):
                g = powers[i].sum() / 4
                key = (modality, int(ids[i]))
                old = remembered.get(key)
                remembered[key] = (g if old is None else 0.3 * old + 0.7 * g).detach()
                losses.append((powers[i].detach() / remembered[key] * h[i] / 4).sum())
            return torch.stack(losses)

        found = loss(pairs, ALONE, data.moment)
        expected = both(data, direction)
        for leaf in (data.image, data.text):  # the surrogate's value is another; its gradient is the paper's
            mine, theirs = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (found, expected))
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-7)


def test_sogclr_without_memory_is_decoupled() -> None:
    data = inputs(6)
    options = {"denominator": {"type": "sogclr", "num_samples": 6, "gamma": 1.0}}
    loss = ContrastiveLoss(from_tree(ContrastiveConfig, options), embed_dim=12).double()
    remembered = loss(data.pairs(), ALONE, data.moment)
    decoupled = loss_of({"weights": ["decoupled"]}, data) / data.scale.detach()
    for leaf in (data.image, data.text):
        mine, theirs = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (remembered, decoupled))
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_isogclr_moves_temperatures_as_its_algorithm_says() -> None:
    numbers = {"num_samples": 8, "gamma": 0.7, "rho": 4.0, "start": 0.05, "minimum": 0.02, "maximum": 0.2}
    options = {"denominator": {"type": "isogclr", **numbers, "step_size": 0.01, "beta": 0.6}}
    loss = ContrastiveLoss(from_tree(ContrastiveConfig, options), embed_dim=12).double()
    state: dict[tuple[str, int], tuple[Tensor | None, Tensor, Tensor]] = {}
    start = (None, torch.tensor(0.05, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    for step in range(5):
        data = inputs(5, seed=step)
        pairs = data.pairs()
        ids = (torch.arange(5) + 2 * step) % 8
        pairs.known["sample_ids"] = ids

        def direction(a: Tensor, c: Tensor, modality: str) -> Tensor:
            h = a @ c.T - (a * c).sum(1, keepdim=True)
            losses = []
            for i in range(5):
                old, tau, velocity = state.get((modality, int(ids[i])), start)
                powers = torch.exp(h[i] / tau).masked_fill(own(data)[i], 0)
                g = powers.sum() / 4
                u = (g if old is None else 0.3 * old + 0.7 * g).detach()
                losses.append((powers.detach() / u * h[i] / 4).sum())
                slope = (u.log() + 4.0 - (powers / u * h[i] / tau).sum() / 4).detach()
                velocity = 0.4 * velocity + 0.6 * slope.clamp(-5, 5)
                state[modality, int(ids[i])] = (u, (tau - 0.01 * velocity).clamp(0.02, 0.2), velocity)
            return torch.stack(losses)

        found = loss(pairs, ALONE, data.moment)
        expected = both(data, direction)
        for leaf in (data.image, data.text):
            mine, theirs = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (found, expected))
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-7)
    moved = {key: float(tau) for key, (_, tau, _) in state.items()}
    assert len({round(value, 6) for value in moved.values()}) > 4, "temperatures must have moved apart"


def toy(sizes: list[int], spread: float, width: int = 16) -> tuple[Tensor, Tensor]:
    """Pairs in clusters of the given sizes: texts near their images, images near their cluster's centre."""
    centres = unit(len(sizes), width, seed=1)
    parts = [centres[i] + spread * unit(n, width, seed=10 + i) for i, n in enumerate(sizes)]
    image = F.normalize(torch.cat(parts), dim=1)
    return image, F.normalize(image + 0.3 * unit(len(image), width, seed=3), dim=1)


def test_a_remembered_denominator_has_the_smaller_bias() -> None:
    """Many samples, batches of four: the mean gradient of batches against the gradient of the whole set."""
    image, text = toy([64], spread=1.5)
    leaf, scale, size = image.clone().requires_grad_(), 20.0, len(image)
    h = leaf @ text.T
    h = torch.stack([h - h.diag()[:, None], h.T - h.diag()[:, None]])
    others = ~torch.eye(size, dtype=torch.bool)
    whole = torch.stack([(scale * x[others].view(size, -1)).logsumexp(1).mean() / scale for x in h]).mean()
    (right,) = torch.autograd.grad(whole, leaf)
    options = {
        "remembered": {"denominator": {"type": "sogclr", "num_samples": size, "gamma": 0.1}},
        "of the batch": {"weights": ["decoupled"]},
    }
    bias = {}
    for name, tree in options.items():
        loss = ContrastiveLoss(from_tree(ContrastiveConfig, tree), embed_dim=16).double()
        total, draw = torch.zeros_like(leaf), torch.Generator().manual_seed(0)
        for number in range(1200):
            rows = torch.randperm(size, generator=draw)[:4]
            pairs = Pairs(leaf[rows], text[rows], torch.tensor(scale, dtype=torch.float64), known={"sample_ids": rows})
            (gradient,) = torch.autograd.grad(loss(pairs, ALONE, Moment(number)), leaf)
            if number >= 200:  # when every sample has been met some times
                total += gradient / 1000 / (1 if name == "remembered" else scale)
        bias[name] = ((total - right).norm() / right.norm()).item()
    assert bias["remembered"] < 0.6 * bias["of the batch"], bias


def test_frequent_meanings_get_a_higher_temperature() -> None:
    """One cluster of 40 pairs and 160 pairs of their own: the denominators of the former concentrate on a fifth of the
    samples, of the latter on none, and rho lies between."""
    image, text = toy([40] + [1] * 160, spread=0.4, width=128)
    numbers = {"num_samples": len(image), "rho": 1.0, "start": 0.1, "minimum": 0.02, "maximum": 0.5, "step_size": 0.005}
    config = from_tree(ContrastiveConfig, {"denominator": {"type": "isogclr", **numbers}})
    loss = ContrastiveLoss(config, embed_dim=128).double()
    draw = torch.Generator().manual_seed(0)
    for number in range(200):
        rows = torch.randperm(len(image), generator=draw)[:50]
        pairs = Pairs(image[rows], text[rows], torch.tensor(1.0, dtype=torch.float64), known={"sample_ids": rows})
        loss(pairs, ALONE, Moment(number))
    temperature = loss.modules_of_plugs["denominator"].image.values[:, 1]
    assert temperature[:40].median() > 1.5 * temperature[40:].median()


def test_adaptive_temperature_and_its_network() -> None:
    options = {"temperature": {"type": "adaptive", "hidden": 4, "penalty_weight": 0.3, "minimum": 0.05}}
    torch.manual_seed(0)
    loss = ContrastiveLoss(from_tree(ContrastiveConfig, options), embed_dim=12).double()
    data = inputs(7)
    network = loss.modules_of_plugs["temperature"].network
    weights = list(loss.parameters())

    def direction(a: Tensor, c: Tensor, _: str) -> Tensor:
        tau = 0.05 + 1.95 * torch.sigmoid(-network(a) @ network(c).T)
        positive = 6 * tau.diag().log() + 1 / tau.diag()
        negative = (tau.log() + 1 / tau).masked_fill(own(data), 0).sum(1) / 6
        return cross_entropy(a @ c.T / tau, eye(data)) + 0.3 * (positive - negative)

    compare(loss(data.pairs(), ALONE, data.moment), both(data, direction), [*data.leaves, *weights])


def test_adaptive_temperature_of_one_value_is_fixed() -> None:
    adaptive = {"type": "adaptive", "minimum": 0.1, "maximum": 0.1, "penalty_weight": 0.0}
    data = inputs(7)
    torch.manual_seed(0)
    config = from_tree(ContrastiveConfig, {"temperature": adaptive})
    found = ContrastiveLoss(config, embed_dim=12).double()(data.pairs(), ALONE, data.moment)
    compare(found, loss_of({"temperature": {"type": "fixed", "temperature": 0.1}}, data), data.leaves)


# --- regularisers ------------------------------------------------------------------------------------------------


def spread(x: Tensor, y: Tensor) -> Tensor:
    others = ~torch.eye(len(x), dtype=torch.bool)
    squared = (x[:, None, :] - y[None, :, :]).square().sum(2)
    return torch.exp(-2 * squared[others]).mean().log()


def grounded(anchor: Tensor, right: Tensor, hard: Tensor, scale: Tensor | float) -> Tensor:
    logits = torch.cat([(anchor * right).sum(1, keepdim=True), torch.einsum("bd,bkd->bk", anchor, hard)], 1)
    return F.cross_entropy(scale * logits, torch.zeros(len(anchor), dtype=torch.long))


REGULARISERS: dict[str, tuple[dict[str, Any], Loss]] = {
    "uniformity": (
        {"type": "uniformity", "weight": 0.3, "cross": 0.5},
        lambda d: (spread(d.image, d.image) + spread(d.text, d.text)) / 2 + 0.5 * spread(d.image, d.text),
    ),
    "alignment": ({"type": "alignment", "weight": 0.3}, lambda d: (d.image - d.text).square().sum(1).mean()),
    "image_grounded": (
        {"type": "image_grounded", "weight": 0.3},
        lambda d: grounded(d.image, d.text, d.hard, d.scale),
    ),
    "text_grounded": (
        {"type": "text_grounded", "weight": 0.3},
        lambda d: grounded(d.text, d.teacher_text, d.hard, 10.0),
    ),
    "distillation": (
        {"type": "distillation", "weight": 0.3},
        lambda d: ((d.image - d.teacher_image).square() + (d.text - d.teacher_text).square()).sum(1).mean(),
    ),
}


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers(name: str) -> None:
    options, oracle = REGULARISERS[name]
    data, leaves = behind_normalisation(9)
    objective = Objective(from_tree(ObjectiveConfig, {"regularisers": [options]}), embed_dim=12)
    terms = objective(data.pairs())
    compare(terms.total, clip(data) + 0.3 * oracle(data), [*leaves, data.hard], atol=1e-9)
    assert set(terms.scalars) == {"contrastive", name, "total"}


def test_uniformity_of_one_pair_is_zero() -> None:
    data = inputs(1)
    config = from_tree(ObjectiveConfig, {"regularisers": ["uniformity"]})
    terms = Objective(config, embed_dim=12)(data.pairs())
    terms.total.backward()
    assert terms.scalars["uniformity"] == 0


# --- what is refused ---------------------------------------------------------------------------------------------


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"normaliser": "sigmoid", "label_smoothing": 0.1}, "label_smoothing"),
    ({"normaliser": "sigmoid", "targets": "momentum"}, "yes or no"),
    ({"normaliser": "soft_topk", "targets": "cwcl"}, "positive"),
    ({"normaliser": "sigmoid", "denominator": "sogclr"}, "denominator"),
    ({"denominator": "sogclr", "targets": "same_caption"}, "partner"),
    ({"denominator": "isogclr", "temperature": "fixed"}, "temperature"),
    ({"denominator": "sogclr", "candidates": ["hard_captions"]}, "candidates"),
    ({"normaliser": "sigmoid", "candidates": ["mochi"]}, "enter a softmax"),
    ({"similarity": "heads", "candidates": ["hard_captions"]}, "head"),
    ({"candidates": ["queue", "hard_captions"]}, "alone"),
    ({"candidates": ["queue"], "weights": ["decoupled"]}, "entries"),
    ({"candidates": ["interpolated"], "weights": ["not_same_caption"]}, "nothing of the kind"),
    ({"targets": "nonsense"}, "unknown type"),
    ({"wieghts": []}, "did you mean 'weights'"),
    ({"gather": {"scope": "group"}}, "group_size"),
    ({"weights": ["repulsion", "repulsion"]}, "twice"),
    ({"weights": ["hardest", "false_negatives"]}, "both keep the nearest"),
    ({"normaliser": "soft_topk", "weights": ["hardest"]}, "all alike"),
    ({"normaliser": "sigmoid", "weights": ["decoupled"]}, "no positive pair"),
    ({"normaliser": "sigmoid", "targets": "cwcl"}, "set anchor to image"),
    ({"targets": "momentum", "candidates": ["hard_captions"]}, "does not know them"),
    ({"targets": "momentum", "temperature": "fixed"}, "uses the learned one"),
    ({"targets": "momentum", "weights": ["decoupled"]}, "over all candidates"),
    ({"targets": "same_caption", "weights": ["not_same_caption"]}, "must be a candidate"),
    ({"denominator": "sogclr", "temperature": "fixed"}, "one of its own"),
    ({"candidates": ["mochi"], "similarity": "extrapolated"}, "new points"),
    ({"candidates": ["mochi", "interpolated"]}, "new points"),
    ({"candidates": ["own_hard_captions"], "label_smoothing": 0.1}, "spread over candidates of all"),
    ({"candidates": ["mochi"], "weights": ["repulsion"]}, "weighs candidates of all"),
    ({"candidates": ["interpolated"], "targets": "same_caption"}, "nothing of the kind"),
    ({"candidates": ["hard_captions"], "targets": "cwcl"}, "nothing of the kind"),
    ({"candidates": ["positive_captions"], "targets": "weighted_positive"}, "shares of right ones"),
    ({"candidates": ["positive_captions"], "weights": ["decoupled"]}, "leaves out what is right"),
    ({"candidates": ["positive_captions"], "normaliser": "sigmoid"}, "enter a softmax"),
    ({"weights": [{"type": "clusters", "numbers": []}]}, "positive"),
    ({"targets": {"type": "momentum", "ramp_samples": -1}}, "ramp_samples"),
]


@pytest.mark.parametrize(("options", "reason"), IMPOSSIBLE, ids=[str(case[0]) for case in IMPOSSIBLE])
def test_impossible_combinations_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_tree(ContrastiveConfig, options)


def test_one_call_refuses_what_must_last() -> None:
    data = inputs(4)
    for options, reason in (
        ({"temperature": "adaptive"}, "temperature must last"),
        ({"denominator": "sogclr"}, "denominator must last"),
        ({"weight": 2.0}, "multiply the loss"),
        ({"gather": {"scope": "rank"}}, "pass `group`"),
    ):
        with pytest.raises(ConfigError, match=reason):
            contrastive_loss(data.image, data.text, 10.0, **options)


def test_draws_follow_the_moment() -> None:
    data = inputs(6)
    options = {"candidates": ["interpolated"]}
    losses = [contrastive_loss(data.image, data.text, 10.0, moment=Moment(step), **options) for step in (0, 1, 1)]
    assert losses[1] == losses[2] != losses[0]


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(ConfigError, match=r"embed_dim \(16\) is no multiple of 3 heads .* use one of 1, 2, 4, 8, 16"):
        ContrastiveLoss(from_tree(ContrastiveConfig, {"similarity": "heads"}), embed_dim=16)


def test_candidates_may_come_in_any_order() -> None:
    data = inputs(8)
    first = loss_of({"candidates": ["interpolated", "hard_captions"]}, data)
    compare(first, loss_of({"candidates": ["hard_captions", "interpolated"]}, data), data.leaves)


def test_measuring_a_loss_is_no_visit() -> None:
    data = inputs(5)
    for kind in ("sogclr", "isogclr"):
        config = from_tree(ContrastiveConfig, {"denominator": {"type": kind, "num_samples": 5}})
        loss = ContrastiveLoss(config, embed_dim=12).double()
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        with torch.no_grad():
            loss(data.pairs(), ALONE, data.moment)
        assert all(value.equal(before[name]) for name, value in loss.state_dict().items())
        loss(inputs(1).pairs(), ALONE, data.moment)  # an anchor without negatives has nothing to remember
        assert all(value.equal(before[name]) for name, value in loss.state_dict().items())
        loss(data.pairs(), ALONE, data.moment)
        assert not all(value.equal(before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("options", [{"candidates": ["queue"]}, {"denominator": "sogclr"}, {"targets": "momentum"}])
def test_what_only_one_side_knows_is_missed(options: dict[str, Any]) -> None:
    data = inputs(4)
    loss = ContrastiveLoss(from_tree(ContrastiveConfig, options), embed_dim=12)
    pairs = Pairs(data.image, data.text, data.scale, image_known={"teacher_features": data.teacher_image})
    with pytest.raises(ConfigError, match="not known"):
        loss(pairs, ALONE)


def test_what_a_plug_needs_must_be_known() -> None:
    data = inputs(4)
    with pytest.raises(ConfigError, match="caption_ids of the images is not known"):
        contrastive_loss(data.image, data.text, 10.0, targets="same_caption")
    for plug, missing in (
        ("hard_captions", "no hard captions"),
        ("positive_captions", "no further captions"),
        ("counter_pairs", "counter_present of the images is not known"),
    ):
        with pytest.raises(ConfigError, match=missing):
            contrastive_loss(data.image, data.text, 10.0, candidates=[plug])
    hard = Pairs(data.image, data.text, data.scale, known={"caption_ids": data.ids}, hard_captions=data.hard)
    loss = ContrastiveLoss(
        from_tree(ContrastiveConfig, {"candidates": ["hard_captions"], "targets": "same_caption"}), embed_dim=12
    )
    with pytest.raises(ConfigError, match="hard_ids of the texts is not known"):
        loss(hard, ALONE)
