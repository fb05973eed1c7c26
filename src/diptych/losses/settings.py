"""The settings of a contrastive loss, and which of them cannot be combined."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from diptych.config import Config, discover
from diptych.distributed.groups import GatherConfig
from diptych.losses.plugs.family import (
    Candidates,
    Denominator,
    SampleWeight,
    Similarity,
    Targets,
    Temperature,
    Weights,
)
from diptych.losses.plugs.normaliser.family import Normaliser

FAMILIES = (
    "similarity",
    "temperature",
    "targets",
    "weights",
    "candidates",
    "normaliser",
    "denominator",
    "sample_weight",
)
for _family in FAMILIES:
    discover(f"diptych.losses.plugs.{_family}")


@dataclass(frozen=True)
class ContrastiveConfig(Config):
    """The contrastive term."""

    weight: float = 1.0
    """Factor of this term in the total."""
    normaliser: Normaliser = field(default_factory=lambda: Normaliser.named("softmax")())
    """How an anchor's logits become its loss: `softmax` is CLIP's, `sigmoid` SigLIP's (give the model a logit_bias)."""
    targets: Targets = field(default_factory=lambda: Targets.named("identity")())
    """Which candidates are right."""
    weights: tuple[Weights, ...] = ()
    """How much candidates count in the denominator; several multiply."""
    candidates: tuple[Candidates, ...] = ()
    """Candidates beside the batch's."""
    similarity: Similarity = field(default_factory=lambda: Similarity.named("dot")())
    """How alike two features are."""
    temperature: Temperature = field(default_factory=lambda: Temperature.named("learned")())
    """From similarities to logits."""
    denominator: Denominator = field(default_factory=lambda: Denominator.named("exact")())
    """What stands for the sum over candidates."""
    sample_weight: SampleWeight = field(default_factory=lambda: SampleWeight.named("uniform")())
    """How much each anchor counts."""
    label_smoothing: float = 0.0
    """Share of a softmax target spread evenly over all candidates, in [0, 1)."""
    gather: GatherConfig = field(default_factory=GatherConfig)
    """Whose features are compared."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        for refusal in refusals(self):
            raise ValueError(refusal)

    @property
    def is_plain(self) -> bool:
        """Whether it is CLIP's or SigLIP's own loss, for which there are kernels."""
        if self.normaliser.choice_name not in ("softmax", "sigmoid"):
            return False
        names = (self.targets.choice_name, self.similarity.choice_name, self.temperature.choice_name)
        plain = names == ("identity", "dot", "learned") and self.denominator.choice_name == "exact"
        return plain and not (self.weights or self.candidates or self.label_smoothing)


_YES_OR_NO = ("identity", "same_caption", "same_label", "cwcl")
_SEVERAL_RIGHT = ("identity", "same_caption", "same_label")
_LOOK_AT_OTHERS = ("not_same_caption", "clusters", "false_negatives", "hardest", "inverse_propensity")
_WITHOUT_OWN = ("decoupled", "clusters")
_OF_SINGLE_ANCHORS = {"mochi", "own_hard_captions", "positive_captions"}
_KNOWN_CAPTIONS = {"hard_captions", "own_hard_captions", "positive_captions", "counter_pairs"}
"""Of these it is known which captions they are."""


def refusals(config: ContrastiveConfig) -> Iterator[str]:
    """Combinations that have no meaning: which, why, and what to choose instead."""
    for family, plugs in (("weights", config.weights), ("candidates", config.candidates)):
        names = [plug.choice_name for plug in plugs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"{family}: {twice[0]} stands there twice; keep one"
    if {"hardest", "false_negatives"} <= {plug.choice_name for plug in config.weights}:
        yield "weights hardest with false_negatives: both keep the nearest; use false_negatives with `keep`"
    yield from _refused_by_normaliser(config)
    yield from _refused_by_targets(config)
    yield from _refused_by_denominator(config)
    yield from _refused_by_candidates(config)


def _refused_by_normaliser(config: ContrastiveConfig) -> Iterator[str]:
    normaliser, temperature = config.normaliser.choice_name, config.temperature.choice_name
    if normaliser == "softmax":
        return
    if config.label_smoothing:
        yield f"label_smoothing with {normaliser}: it spreads a softmax target; set it to 0"
    if config.denominator.choice_name != "exact":
        yield f"denominator {config.denominator.choice_name} with {normaliser}: only softmax has one; use exact"
    if temperature == "adaptive":
        yield f"temperature adaptive with {normaliser}: its penalty belongs to softmax; use learned or fixed"
    if normaliser == "sigmoid":
        yield from _refused_by_sigmoid(config)
        return
    if (targets := config.targets.choice_name) not in _SEVERAL_RIGHT:
        right = ", ".join(_SEVERAL_RIGHT)
        yield f"targets {targets} with {normaliser}: every candidate would be a positive; use {right}"
    if normaliser == "soft_topk" and config.weights:
        yield "weights with soft_topk: it counts candidates, all alike; drop the weights"


def _refused_by_sigmoid(config: ContrastiveConfig) -> Iterator[str]:
    if (targets := config.targets.choice_name) not in _YES_OR_NO:
        yield f"targets {targets} with sigmoid: they are no yes or no of each pair; use {', '.join(_YES_OR_NO)}"
    if getattr(config.targets, "anchor", "image") != "image":
        yield "targets cwcl with sigmoid: only images are anchors there; set anchor to image"
    if without := [plug.choice_name for plug in config.weights if plug.choice_name in _WITHOUT_OWN]:
        yield f"weights {without[0]} with sigmoid: no positive pair would be left; drop it"
    if config.temperature.choice_name == "per_anchor":
        yield "temperature per_anchor with sigmoid: a pair has one logit there; use learned or fixed"


def _refused_by_targets(config: ContrastiveConfig) -> Iterator[str]:
    targets, temperature = config.targets.choice_name, config.temperature.choice_name
    weights = [plug.choice_name for plug in config.weights]
    if targets == "weighted_positive" and temperature == "adaptive":
        yield "targets weighted_positive with temperature adaptive: both decide how hard a positive pulls; use one"
    if targets in ("same_caption", "same_label") and "not_same_caption" in weights:
        yield f"targets {targets} with weights not_same_caption: what is right must be a candidate; use one of the two"
    if targets != "momentum":
        return
    if weights:
        yield "targets momentum with weights: the teacher's share is over all candidates; drop the weights"
    if temperature != "learned":
        yield f"targets momentum with temperature {temperature}: the teacher uses the learned one; use learned"
    if others := [plug.choice_name for plug in config.candidates if plug.choice_name != "queue"]:
        yield f"targets momentum with candidates {', '.join(others)}: the teacher does not know them; use queue"


def _refused_by_denominator(config: ContrastiveConfig) -> Iterator[str]:
    denominator, temperature = config.denominator.choice_name, config.temperature.choice_name
    if denominator == "exact":
        return
    relative = f"denominator {denominator} is remembered relative to the one partner"
    if config.targets.choice_name != "identity":
        yield f"{relative}, not with targets {config.targets.choice_name}; use identity"
    if config.label_smoothing:
        yield f"{relative}, not with label_smoothing; set it to 0"
    if config.candidates:
        yield f"denominator {denominator} with candidates: its average is over the batch; drop the candidates"
    if any(plug.choice_name in _WITHOUT_OWN for plug in config.weights):
        yield f"weights without the own partner with denominator {denominator}: it is left out already; drop them"
    if config.similarity.choice_name == "heads":
        yield f"denominator {denominator} with similarity heads: a sample has one denominator, not one a head; use dot"
    if temperature != "learned":
        yield f"denominator {denominator} with temperature {temperature}: it keeps to one of its own; use learned"


def _refused_by_candidates(config: ContrastiveConfig) -> Iterator[str]:
    names = {plug.choice_name for plug in config.candidates}
    if not names:
        return
    listed, weights = ", ".join(sorted(names)), [plug.choice_name for plug in config.weights]
    if config.similarity.choice_name == "heads":
        yield f"candidates {listed} with similarity heads: they are features of one head; use dot"
    if config.temperature.choice_name == "adaptive":
        yield f"candidates {listed} with temperature adaptive: its penalty is over the batch; use learned or fixed"
    unknown = f"candidates {listed}: nothing of the kind is known of them that"
    looking = [name for name in _LOOK_AT_OTHERS if name != "not_same_caption" or names - _KNOWN_CAPTIONS]
    if blind := [name for name in weights if name in looking]:
        yield f"{unknown} weights {', '.join(blind)} look at; drop one of the two"
    targets = config.targets.choice_name
    if targets in ("cwcl", "soft_labels", "same_label") or (targets == "same_caption" and names - _KNOWN_CAPTIONS):
        yield f"{unknown} targets {targets} look at; use identity"
    if "positive_captions" in names:
        yield from _refused_by_positives(config)
    if "mochi" in names and (config.similarity.choice_name == "extrapolated" or "interpolated" in names):
        yield "candidates mochi with extrapolated or interpolated: both make new points of the same ones; use one"
    if names & _OF_SINGLE_ANCHORS:
        yield from _refused_by_single_anchors(config, ", ".join(sorted(names & _OF_SINGLE_ANCHORS)))
    if "queue" in names:
        yield from _refused_by_queue(config)


def _refused_by_single_anchors(config: ContrastiveConfig, listed: str) -> Iterator[str]:
    if config.normaliser.choice_name != "softmax":
        yield f"candidates {listed} with {config.normaliser.choice_name}: they enter a softmax; use hard_captions"
    if config.label_smoothing:
        yield f"candidates {listed} with label_smoothing: it is spread over candidates of all anchors; set it to 0"
    if any(plug.choice_name == "repulsion" for plug in config.weights):
        yield f"candidates {listed} with weights repulsion: it weighs candidates of all anchors; drop one of the two"


def _refused_by_positives(config: ContrastiveConfig) -> Iterator[str]:
    if (targets := config.targets.choice_name) not in ("identity", "same_caption"):
        yield f"candidates positive_captions with targets {targets}: shares of right ones are equal; use identity"
    if without := [plug.choice_name for plug in config.weights if plug.choice_name in _WITHOUT_OWN]:
        yield f"candidates positive_captions with weights {without[0]}: it leaves out what is right; drop it"


def _refused_by_queue(config: ContrastiveConfig) -> Iterator[str]:
    if config.normaliser.choice_name != "softmax":
        yield f"candidates queue with {config.normaliser.choice_name}: it belongs to softmax"
    if len(config.candidates) > 1:
        yield "candidates queue with others: it replaces the batch's candidates by the teacher's; use it alone"
    if config.weights:
        yield "candidates queue with weights: nothing of the kind is known of its entries; drop the weights"
