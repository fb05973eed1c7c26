"""What a few-shot comparison is made of: sets, methods, numbers of pictures, seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.config import Config, from_tree, merge
from diptych.models.adapters.family import Adapter
from diptych.models.prompts.family import ClassAdapter
from diptych.train.recipe import Recipe
from diptych_eval.embedder import EmbedSettings

_SHARE_OF_WARMUP = 10
CHOSEN = "chosen"
"""Of `Method.tuned_share`."""
SHARE = "tuned_share"
"""The figure that says what was chosen."""
OWN_FIGURES = ("top1", "base", "new", "harmonic_mean", SHARE)
"""All others are of further sets."""


@dataclass(frozen=True)
class Method(Config):
    """One way of tuning."""

    name: str
    """What its rows are called."""
    recipe: dict[str, Any]
    """Keys of a run's configuration over the plan's. Adapters that read classes get their names from the set."""
    epochs: int | None = None
    """Times that each picture is seen; none: the plan's."""
    tuned_share: float | Literal["chosen"] | None = None
    """Weights are put between the base's and the tuned ones, this share of the way, after training (WiSE-FT,
    arXiv:2109.01903; 0.5 where nothing can be held out to choose it on). `chosen`: the tenth that does best on held-out
    pictures, as many of each class as shots or as there are, of the root's part `val` where there is one, else of those
    of `train` that were not drawn; they are pictures beyond the shots. None: weights as they are."""

    frozen_first: tuple[str, ...] = ()
    """Beginnings of the names of parameters that learn in the second half of the run alone (`stages`): `[image_tower]`,
    with the adapter `classifier`, is LP-FT (arXiv:2202.10054)."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if isinstance(self.tuned_share, float) and not 0 <= self.tuned_share <= 1:
            raise ValueError(f"tuned_share must lie in [0, 1], or be chosen, not {self.tuned_share}")


@dataclass(frozen=True)
class OtherSet(Config):
    """A further test set."""

    name: str
    """What its column is called."""
    root: str
    """As the plan's, of which only `test` is read. With the plan's classes it is a shift of domain, and everything that
    was learned is measured on it; with classes of its own it is another data set (cross-dataset), read by their
    names."""

    def __post_init__(self) -> None:
        if self.name in OWN_FIGURES:
            raise ValueError(f"another set must not be called {self.name!r}, as a figure is")


@dataclass(frozen=True)
class FewShotPlan(Config):
    """A comparison of methods that learn from few pictures."""

    root: str
    """Folder in clip-benchmark's layout with `train` and `test`, or with a folder per class in each."""
    out: Path
    """Where runs, results and the page go; the same command goes on there."""
    recipe: dict[str, Any]
    """Keys of a run's configuration for all methods: `model.towers` names the base."""
    methods: tuple[Method, ...] = ()
    """Ways of tuning; zero-shot, linear probe, Tip-Adapter and Tip-Adapter-F, which leave the model as it is, are
    always there."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Pictures of each class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the draw and of the training."""
    split: Literal["all", "base_to_new"] = "all"
    """`base_to_new`: the first half of the classes is learned from, and both halves are measured, each among its own
    names (arXiv:2203.05557)."""
    others: tuple[OtherSet, ...] = ()
    """Sets that the same tuned models are measured on besides."""
    classes: str | None = None
    """As in the task `zeroshot`."""
    templates: str | None = None
    """As in the task `zeroshot`."""
    epochs: int = 50
    """Times that each picture is seen."""
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    """How features are made."""

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or not self.seeds:
            raise ValueError("shots must be at least 1, and there must be a seed")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names) or set(names) & set(BASELINES):
            raise ValueError(f"methods must have different names, and none of {', '.join(BASELINES)}")

    def recipe_of(self, method: Method, names: tuple[str, ...], cell: "Cell", shards: Path, run: Path) -> Recipe:
        """The run of one cell.

        Raises:
            ConfigError: the keys make no run.
        """
        tree = merge(self.recipe, method.recipe)
        model = dict(tree.get("model", {}))
        model["adapters"] = [_with_names(adapter, names) for adapter in model.get("adapters", ())]
        pictures = cell.shots * len(names)
        batch = min(int(tree.get("global_batch", 32)), pictures)
        total = max(pictures * (method.epochs or self.epochs) // batch, 1) * batch
        data = {"shards": str(shards), "lanes": 1, "workers": 0, "labels": True}
        given = {"run": str(run), "seed": cell.seed, "global_batch": batch, "total_samples": total, "model": model}
        if method.frozen_first:
            given["stages"] = [{"until_samples": max(total // 2, 1), "frozen": list(method.frozen_first)}]
        base: dict[str, Any] = {
            "data": data,
            "log": {"tensorboard": False},
            "optim": {"schedule": {"warmup_samples": total // _SHARE_OF_WARMUP}},
        }
        return from_tree(Recipe, merge(merge(base, tree), given), where=f"method {method.name}")


BASELINES = ("zero-shot", "linear probe", "Tip-Adapter", "Tip-Adapter-F (trained keys)")


@dataclass(frozen=True)
class Cell:
    """One measurement of a method."""

    method: str
    shots: int
    """0: nothing was learned from."""
    seed: int


def _with_names(adapter: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    kind = Adapter.members.get(adapter.get("type", ""))
    reads = kind is not None and issubclass(kind, ClassAdapter)
    return {**adapter, "classes": list(names)} if reads and "classes" not in adapter else dict(adapter)
