"""What a run reads: the settings of its data, and the sources that they name, resolved to shards."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from diptych.config import Config
from diptych.data.captions import CaptionConfig
from diptych.data.images import ImageConfig
from diptych.data.mixture import Mixture, shares
from diptych.data.remote import RemoteConfig
from diptych.data.shards import list_shards


@dataclass(frozen=True)
class SourceConfig(Config):
    """One of several sources."""

    name: str
    """What its counters are called."""
    shards: str
    """As `data.shards`."""
    weight: float = 1.0
    """Its share of every batch, relative to the other sources; 0: none until `data.weight_changes` says otherwise."""
    lanes: int | None = None
    """Its parallel streams; none: `data.lanes`."""
    language: str | None = None
    """Replaces `{language}` in the names of its caption columns, such as `caption_{language}`."""
    captions: CaptionConfig | None = None
    """Its captions; none: `data.captions`."""
    images: ImageConfig | None = None
    """Its crop and augmentation; none: `data.images`."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a source needs a name")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be a number from 0 on, not {self.weight}")
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"lanes must be at least 1, not {self.lanes}")


@dataclass(frozen=True)
class WeightChange(Config):
    """New weights from a point of the run on."""

    at_samples: int
    """Samples seen, all ranks together, when it takes effect."""
    weights: dict[str, float]
    """Source → weight; sources that are not named keep theirs."""


@dataclass(frozen=True)
class DataConfig(Config):
    """The training data and how it is read."""

    shards: str | None = None
    """Folder of shards, a glob, or a brace pattern such as `data/{000000..000099}.tar`; also of URLs and `pipe:`."""
    lanes: int = 64
    """Parallel streams; fixes the global order. A multiple of ranks × workers, at most the number of shards."""
    shuffle_window: int = 5000
    """Samples shuffled together within a lane."""
    workers: int = 2
    """Loader processes per rank; 0 prepares samples in the training process."""
    images: ImageConfig = field(default_factory=ImageConfig)
    """Crop and augmentation."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """Which caption a picture gets."""
    labels: bool = False
    """Whether each sample brings the number of its class, its .cls member; one without is unusable (`bad_label`)."""
    counter_images: bool = False
    """Whether samples bring a picture of one of their wrong captions (`neg.jpg`, as `diptych data negatives images=…`
    writes it) and that caption; those without one are used as they are."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, mixed in every batch by weight; in place of `shards`."""
    weight_changes: tuple[WeightChange, ...] = ()
    """Other weights later in the run, in the order of `at_samples`."""
    cache_mib: int = 0
    """Memory per worker for prepared pictures, MiB: small sets are decoded once, where images.min_crop is 1."""
    max_bad_fraction: float = 0.01
    """The run stops when more than this share of the samples is unusable."""
    prefetch_batches: int = 2
    """Batches that workers prepare ahead, held in shared memory."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Shards that are no local files."""

    def __post_init__(self) -> None:
        if (self.shards is None) == (not self.sources):
            raise ValueError("give either shards or sources")
        if self.lanes < 1 or self.shuffle_window < 1 or self.workers < 0 or self.cache_mib < 0:
            raise ValueError("lanes and shuffle_window must be at least 1, workers and cache_mib at least 0")
        if self.prefetch_batches < 1:
            raise ValueError(f"prefetch_batches must be at least 1, not {self.prefetch_batches}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], not {self.max_bad_fraction}")
        self._check_sources()

    def _check_sources(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, not {', '.join(names)}")
        kinds = {
            (c.hard and c.hard.count, c.positive and c.positive.count, bool(c.second_views))
            for c in self.caption_configs
        }
        if len(kinds) > 1:
            raise ValueError(
                "all sources must bring as many hard and further right captions, and a second caption or none"
            )
        starts = [0, *(change.at_samples for change in self.weight_changes)]
        if sorted(set(starts)) != starts:
            raise ValueError("weight_changes must be in the order of at_samples, each above 0 and only once")
        strange = [name for change in self.weight_changes for name in change.weights if name not in names]
        if strange:
            raise ValueError(f"weight_changes name a source {strange[0]!r}; there are: {', '.join(names) or 'none'}")
        for start, weights in self.weight_stages():
            if not all(0 <= weight < math.inf for weight in weights) or not any(weights or (1,)):
                raise ValueError(f"from sample {start} on, no source has a positive weight, or one has a negative")

    def weight_stages(self) -> list[tuple[int, tuple[float, ...]]]:
        """(samples seen, weight of each source from there on)."""
        weights = {source.name: source.weight for source in self.sources}
        stages = [(0, tuple(weights.values()))]
        for change in self.weight_changes:
            weights |= change.weights
            stages.append((change.at_samples, tuple(weights[source.name] for source in self.sources)))
        return stages

    @property
    def caption_configs(self) -> tuple[CaptionConfig, ...]:
        """The caption settings of every source."""
        own = tuple(source.captions or self.captions for source in self.sources)
        return own or (self.captions,)


@dataclass(frozen=True)
class Source:
    """A source as its readers need it."""

    name: str
    """Empty where there is only one."""
    pattern: str
    shards: tuple[str, ...]
    lanes: int
    captions: CaptionConfig
    images: ImageConfig
    with_classes: bool = False
    """Whether samples bring the numbers of their classes."""
    with_counters: bool = False
    """Whether they bring counter-images."""

    @cached_property
    def labels(self) -> dict[str, str]:
        """Shard → what tells it from the others, wherever they all lie: its address without what all have in common."""
        plain = [shard if shard.startswith("pipe:") else shard.partition("?")[0] for shard in self.shards]
        before = _in_common(plain)
        after = _in_common([address[before:][::-1] for address in plain])
        return {
            shard: address[before : len(address) - after] for shard, address in zip(self.shards, plain, strict=True)
        }

    @cached_property
    def digest(self) -> str:
        """Tells one list of shards from another, wherever they lie: their number, and a hash of their labels."""
        labels = "\n".join(self.labels[shard] for shard in self.shards)
        return f"{len(self.shards)}:{hashlib.blake2b(labels.encode(), digest_size=8).hexdigest()}"


def _in_common(texts: Sequence[str]) -> int:
    """Characters that all begin with: those of the first and the last in alphabetical order do."""
    first, last = min(texts), max(texts)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def resolve(config: DataConfig) -> tuple[Source, ...]:
    """The sources of the settings, with their lists of shards.

    Raises:
        DataError: a source has no shards.
    """
    if config.shards is not None:
        shards = list_shards(config.shards, max_missing=config.max_bad_fraction)
        return (Source("", config.shards, shards, config.lanes, config.captions, config.images, *_brings(config)),)
    return tuple(_resolve(config, source) for source in config.sources)


def _brings(config: DataConfig) -> tuple[bool, bool]:
    return config.labels, config.counter_images


def _resolve(config: DataConfig, source: SourceConfig) -> Source:
    captions = source.captions or config.captions
    if source.language is not None:
        captions = captions.in_language(source.language)
    shards = list_shards(source.shards, max_missing=config.max_bad_fraction)
    lanes = source.lanes if source.lanes is not None else config.lanes
    return Source(source.name, source.shards, shards, lanes, captions, source.images or config.images, *_brings(config))


def mixture(config: DataConfig, seed: int) -> Mixture:
    """The shares of the settings' sources over time."""
    stages: Sequence[tuple[int, tuple[float, ...]]] = config.weight_stages() if config.sources else [(0, (1.0,))]
    return Mixture(tuple((start, shares(weights)) for start, weights in stages), seed)
