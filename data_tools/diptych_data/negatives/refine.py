"""Adversarial refinement: what a text-only classifier recognises becomes rare, and what is left of it goes.

Two players. One chooses negatives, the other, trained on what was chosen, tells them from captions without a picture.
After each round a candidate's chance falls with the classifier's confidence that it is false, summed over the rounds
(multiplicative weights); of all rounds each kind keeps the one with the least bias. Where no mixture of the candidates
hides a kind, pairs go until as many are guessed right as wrong, at every level of confidence: the refinement of
SugarCrepe (arXiv:2306.14610). Pairs are judged by models that have not seen their caption.

What is learned is a set of weights per kind and fold, so it holds for pictures beyond those it was learned from, and
each shard is chosen from by itself.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.seeding import derive
from diptych_data.negatives import guesser
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.guesser import Accuracy
from diptych_data.negatives.ngrams import DIM, Rows, differences
from diptych_data.negatives.options import RefineConfig
from diptych_data.negatives.select import choose, noise

_BINS = 8
_SALT = "refine"


@dataclass(frozen=True)
class Drop:
    """How many pairs of a kind stay, by what a classifier thinks of them."""

    weights: Float[Tensor, "DIM FOLDS"]
    edges: Float[Tensor, " inner"]
    """Between the bins of confidence."""
    keep: Float[Tensor, "2 BINS"]
    """Chance to stay of what is guessed wrong, and right, in each bin."""

    def stays(self, gap: Float[Tensor, " N"], chance: Float[Tensor, " N"]) -> Tensor:
        """Which pairs stay, by a number in [0, 1) of each one's own."""
        keep = self.keep[(gap > 0).long(), torch.bucketize(gap.abs(), self.edges)]
        return (gap == 0) | (chance < keep)


@dataclass(frozen=True)
class Kind:
    """Candidates of one kind, and what a classifier sees of them."""

    places: list[int]
    negatives: list[Negative]
    rows: Rows
    fold: Int[Tensor, " N"]
    """Of the caption."""
    other: Int[Tensor, " N"]
    """Of the negative."""


def _kind(places: list[int], negatives: Sequence[Negative]) -> Kind:
    found = [negatives[place] for place in places]
    rows = differences([(one.of, one.text) for one in found])
    fold, other = (guesser.folds(texts, salt=_SALT) for texts in ([n.of for n in found], [n.text for n in found]))
    return Kind(places, found, rows, fold, other)


@dataclass
class Refinement:
    """What was learned, by kind."""

    pull: dict[str, Float[Tensor, "DIM FOLDS"]] = field(default_factory=dict)
    """Summed weights of the classifiers: what they recognise is chosen less often."""
    drops: dict[str, list[Drop]] = field(default_factory=lambda: defaultdict(list))

    def keys(self, negatives: Sequence[Negative], *, seed: int, number: int) -> list[float | None]:
        """The greater, the sooner chosen; None: not at all."""
        keys: list[float | None] = [noise(one, seed, number) for one in negatives]
        by_kind: dict[str, list[int]] = defaultdict(list)
        for place, one in enumerate(negatives):
            by_kind[one.kind].append(place)
        for kind, places in by_kind.items():
            if kind in self.pull or self.drops.get(kind):
                self.adjust(keys, _kind(places, negatives), kind, seed)
        return keys

    def adjust(self, keys: list[float | None], found: "Kind", kind: str, seed: int) -> None:
        """Changes the keys of a kind's candidates."""
        gap = torch.zeros(found.rows.count, dtype=torch.float64)
        if kind in self.pull:
            gap = guesser.gaps(found.rows, found.fold, self.pull[kind])
        stays = torch.ones(found.rows.count, dtype=torch.bool)
        for level, drop in enumerate(self.drops.get(kind, ())):
            confidence = guesser.gaps(found.rows, found.fold, drop.weights)
            stays &= drop.stays(confidence, _chances(found.negatives, seed, level))
        for place, pull, stay in zip(found.places, gap.tolist(), stays.tolist(), strict=True):
            keys[place] = (keys[place] or 0.0) - pull if stay else None


def _chances(negatives: Sequence[Negative], seed: int, level: int) -> Float[Tensor, " N"]:
    draws = [derive(seed, "drop", level, one.how, one.text, one.of) / (1 << 63) for one in negatives]
    return torch.tensor(draws, dtype=torch.float64)


# --- learning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    pictures: list[list[int]]
    """Places of each picture's candidates."""
    negatives: list[Negative]
    noise: Float[Tensor, " N"]
    kinds: dict[str, Kind]


def learn(
    pictures: Sequence[tuple[int, Sequence[Negative]]], config: RefineConfig, *, per_picture: int, seed: int
) -> Refinement:
    """The refinement for these pictures' candidates, and for others of their sort.

    Args:
        pictures: number of each sample in its shard, and its candidates.
    """
    pool = _pool(pictures, seed)
    refinement = Refinement()
    best: dict[str, tuple[float, Tensor]] = {}
    pull = {kind: torch.zeros(DIM, guesser.FOLDS, dtype=torch.float64) for kind in pool.kinds}
    for _ in range(config.rounds):
        chosen = _chosen(pool, refinement, pull, per_picture, seed)
        for kind, (found, weights, _gap) in _trained(pool, chosen, config).items():
            if kind not in best or found.bias < best[kind][0]:
                best[kind] = (found.bias, pull[kind])
            pull[kind] = pull[kind] + weights
    refinement.pull = {kind: weights for kind, (_, weights) in best.items()}
    for _ in range(config.drops):
        chosen = _chosen(pool, refinement, refinement.pull, per_picture, seed)
        wrong = {k: t for k, t in _trained(pool, chosen, config).items() if t[0].value > 0.5 + config.max_bias}
        for kind, (_, weights, gap) in wrong.items():
            refinement.drops[kind].append(_drop(weights, gap))
        if not wrong:
            break
    return refinement


def _pool(pictures: Sequence[tuple[int, Sequence[Negative]]], seed: int) -> _Pool:
    negatives: list[Negative] = []
    owned, draws = [], []
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, candidates in pictures:
        owned.append(list(range(len(negatives), len(negatives) + len(candidates))))
        for one in candidates:
            by_kind[one.kind].append(len(negatives))
            negatives.append(one)
            draws.append(noise(one, seed, number))
    kinds = {kind: _kind(by_kind[kind], negatives) for kind in sorted(by_kind)}
    return _Pool(owned, negatives, torch.tensor(draws, dtype=torch.float64), kinds)


def _chosen(
    pool: _Pool, refinement: Refinement, pull: Mapping[str, Tensor], per_picture: int, seed: int
) -> frozenset[int]:
    keys: list[float | None] = pool.noise.tolist()
    for name, kind in pool.kinds.items():
        adjusted = Refinement({name: pull[name]} if name in pull else {}, refinement.drops)
        adjusted.adjust(keys, kind, name, seed)
    taken: Counter[str] = Counter()
    chosen: set[int] = set()
    for places in pool.pictures:
        by_one = {pool.negatives[place]: place for place in places}
        found = choose(
            [pool.negatives[place] for place in places], [keys[place] for place in places], per_picture, taken
        )
        chosen.update(by_one[one] for one in found)
    return frozenset(chosen)


def _trained(
    pool: _Pool, chosen: frozenset[int], config: RefineConfig
) -> dict[str, tuple[Accuracy, Tensor, Float[Tensor, " N"]]]:
    """By kind, where there are captions enough: how well it is recognised, by which weights, with which confidence."""
    results = {}
    for name, kind in pool.kinds.items():
        mask = torch.tensor([place in chosen for place in kind.places])
        captions = [one.of for one, used in zip(kind.negatives, mask.tolist(), strict=True) if used]
        if len(set(captions)) < config.min_captions:
            continue
        rows, fold = kind.rows.taken(mask), kind.fold[mask]
        weights = guesser.fit(rows, fold, kind.other[mask])
        gap = guesser.gaps(rows, fold, weights)
        results[name] = (guesser.accuracy(gap, captions), weights, gap)
    return results


def _drop(weights: Tensor, gap: Float[Tensor, " N"]) -> Drop:
    """Chances by which, in every bin of confidence, as many stay that are guessed right as wrong."""
    sizes = gap.abs()
    edges = sizes.quantile(torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1])
    place = torch.bucketize(sizes, edges)
    right = place[gap > 0].bincount(minlength=_BINS).double()
    wrong = place[gap < 0].bincount(minlength=_BINS).double()
    keep = torch.stack([right / wrong.clamp(min=1), wrong / right.clamp(min=1)]).clamp(max=1)
    return Drop(weights, edges, keep)


# --- the file ------------------------------------------------------------------------------------------------------


def save(refinement: Refinement, path: Path) -> None:
    """Writes what was learned in one step."""
    tensors = {f"pull/{kind}": weights for kind, weights in refinement.pull.items()}
    for kind, drops in refinement.drops.items():
        for level, drop in enumerate(drops):
            tensors |= {f"drop/{kind}/{level}/{name}": value.contiguous() for name, value in vars(drop).items()}
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(safetensors.torch.save({name: value.clone() for name, value in sorted(tensors.items())}))
    part.replace(path)


def load(path: Path) -> Refinement:
    """What `save` wrote."""
    tensors = safetensors.torch.load_file(path)
    refinement = Refinement()
    for name in sorted(tensors):
        part, kind, *rest = name.split("/")
        if part == "pull":
            refinement.pull[kind] = tensors[name]
        elif rest[1] == "weights":
            fields = {key: tensors[f"drop/{kind}/{rest[0]}/{key}"] for key in ("weights", "edges", "keep")}
            refinement.drops[kind].append(Drop(**fields))
    return refinement
