"""Multinomial logistic regression on frozen features, solved to its optimum.

    min over W, b of  mean_i −log softmax(W x_i + b)[y_i] + strength/2 · ‖W‖²,   x = (features − centre) / scale

centre: their mean. scale: one number, the root mean square distance from it; so a strength means the same for models
whose features lie close together and for those that spread them, and for few pictures and many. No direction is
stretched: that would make noise as loud as the rest. scikit-learn's `C` is 1 / (strength · N) on the same x.

The problem is strictly convex in W, so there is one answer whichever way one goes there. L-BFGS goes until no
derivative is larger than 1e-7, for 1,000 steps at most (as in arXiv:2103.00020), which very weak penalties may exceed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import DataError
from diptych.seeding import derive
from diptych_eval import metrics
from diptych_eval.labelled import Labelled

_ENTRIES = 2**24
"""Of the matrix of pictures and classes that is in memory at once."""
_MOST_STEPS = 1000
_FLAT = 1e-7
"""Where no derivative is larger, the optimum is reached."""
_COARSE = (0.0, -2.0, -4.0, -6.0, -8.0, -10.0)
_FINER = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class LinearModel:
    """A linear classifier of features as they are; float64."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    steps: int
    """Of L-BFGS."""
    slope: float
    """The largest derivative left."""

    def scores(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits."""
        return features.double() @ self.weight.T + self.bias

    def ranks(self, test: Labelled) -> Int[Tensor, " N"]:
        """Of each picture's class among all; equal scores count against it."""
        rows = zip(*(part.split(_rows(len(self.bias))) for part in (test.features, test.labels)), strict=True)
        return torch.cat([metrics.class_ranks(self.scores(features), labels) for features, labels in rows])


class Problem:
    """The pictures to learn from, made ready once for all strengths."""

    def __init__(self, train: Labelled) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        features = train.features.double()
        self._centre = features.mean(0)
        centred = features - self._centre
        self._scale = float(centred.square().sum(1).mean().sqrt()) or 1.0
        self._x, self._y = (centred / self._scale).to(self._device), train.labels.to(self._device)
        self._shape = (len(train.classes), features.shape[1] + 1)
        self._known = bool(self._x.isfinite().all())

    def solve(self, strength: float, start: LinearModel | None = None) -> LinearModel:
        """The optimum.

        Args:
            start: a solution for another strength, from where it is not far.
        """
        if not self._known:  # of a model that broke down: nothing is right
            nothing = torch.full(self._shape, torch.nan, dtype=torch.float64)
            return LinearModel(nothing[:, :-1], nothing[:, -1], 0, torch.nan)
        point = torch.zeros(self._shape, dtype=torch.float64)
        if start is not None:
            point[:, :-1] = start.weight * self._scale
            point[:, -1] = start.bias + start.weight @ self._centre
        point = point.to(self._device)
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=_MOST_STEPS,
            max_eval=2 * _MOST_STEPS,
            tolerance_grad=_FLAT,
            tolerance_change=1e-14,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(self._closure(point, strength))
        self._closure(point, strength)()
        slope = float(point.grad.abs().max()) if point.grad is not None else 0.0
        found = point.cpu()
        weight = found[:, :-1] / self._scale
        return LinearModel(weight, found[:, -1] - weight @ self._centre, optimizer.state[point]["n_iter"], slope)

    def _closure(self, point: Tensor, strength: float) -> Callable[[], float]:
        """The loss, which leaves its derivative in `point.grad`; the last column is the bias."""

        def loss_and_slope() -> float:
            weight, bias = point[:, :-1], point[:, -1]
            slope = torch.cat([strength * weight, torch.zeros_like(bias)[:, None]], 1)
            loss = strength / 2 * weight.square().sum()
            for x, y in self._blocks():
                share = (x @ weight.T + bias).log_softmax(1)
                loss -= share.gather(1, y[:, None]).sum() / len(self._x)
                share = share.exp_().scatter_add_(1, y[:, None], -torch.ones_like(share[:, :1])) / len(self._x)
                slope[:, :-1] += share.T @ x
                slope[:, -1] += share.sum(0)
            point.grad = slope
            return float(loss)

        return loss_and_slope

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = _rows(self._shape[0])
        return zip(self._x.split(size), self._y.split(size), strict=True)


def _rows(num_classes: int) -> int:
    return max(1, _ENTRIES // num_classes)


@dataclass(frozen=True)
class Chosen:
    """A strength, and how well it did on what was held out."""

    strength: float
    top1: float
    loss: float
    """Mean cross-entropy."""
    model: LinearModel
    """What was learned from the rest."""

    @property
    def merit(self) -> tuple[float, float, float]:
        """Higher is better."""
        return self.top1, -self.loss, self.strength


def choose_strength(train: Labelled, *, share: float, seed: int) -> Chosen:
    """The strength that does best on a part of the training pictures, which is held out for that.

    First each second power of ten from 1 down to 1e-10; then, four times, on both sides of the best one, at half the
    distance of the time before: to an eighth of a power. Better is a higher top-1 accuracy; among equals a lower loss;
    among equals the greater strength.

    Source: arXiv:2103.00020, appendix A.3 (there for features of any length, from 1e-6 to 1e6).

    Raises:
        DataError: no class has two pictures.
    """
    held = held_out(train, share=share, seed=seed)
    if not held.any():
        raise DataError(f"no class has two pictures, one to hold out · {train.where} · set strength")
    problem, rest = Problem(train.rows((~held).nonzero()[:, 0])), train.rows(held.nonzero()[:, 0])
    tried: dict[float, Chosen] = {}

    def attempt(exponent: float) -> None:
        near = min(tried, key=lambda other: abs(other - exponent), default=None)
        model = problem.solve(10**exponent, tried[near].model if near is not None else None)
        top1, loss = _judge(model, rest)
        tried[exponent] = Chosen(10**exponent, top1, loss, model)

    for exponent in _COARSE:
        attempt(exponent)
    for step in _FINER:
        best = max(tried, key=lambda exponent: tried[exponent].merit)
        for exponent in (best + step, best - step):
            if _COARSE[-1] <= exponent <= _COARSE[0]:
                attempt(exponent)
    return max(tried.values(), key=lambda one: one.merit)


def _judge(model: LinearModel, rest: Labelled) -> tuple[float, float]:
    """Top-1 accuracy and mean cross-entropy."""
    parts = zip(*(part.split(_rows(len(model.bias))) for part in (rest.features, rest.labels)), strict=True)
    losses = [F.cross_entropy(model.scores(features), labels, reduction="sum") for features, labels in parts]
    return metrics.recall_at(model.ranks(rest), 1), float(torch.stack(losses).sum()) / len(rest)


def held_out(train: Labelled, *, share: float, seed: int) -> Tensor:
    """Which pictures are held out: that share of each class, rounded, at least one of two or more and never all.

    Which they are depends on the seed, the class and the keys alone.
    """
    marks = torch.zeros(len(train), dtype=torch.bool)
    for rows in shuffled_classes(train, seed, "held out"):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        marks[rows[:count]] = True
    return marks


def shuffled_classes(train: Labelled, seed: int, purpose: str) -> list[Int[Tensor, " n"]]:
    """Each class's rows in an order that depends on the seed, the class and the keys alone."""
    rows: list[list[int]] = [[] for _ in train.classes]
    for row, label in enumerate(train.labels.tolist()):
        rows[label].append(row)

    def place(row: int) -> tuple[int, str]:
        key = train.keys[row]
        return derive(seed, purpose, train.classes[int(train.labels[row])], key), key

    return [torch.tensor(sorted(some, key=place), dtype=torch.long) for some in rows]
