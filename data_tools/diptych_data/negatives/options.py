"""What `diptych data negatives` is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.config import Config
from diptych_data.negatives.images.family import CounterImages, find_sources
from diptych_data.negatives.language.family import Writer, find_writers
from diptych_data.negatives.language.plausible import PlausibleConfig
from diptych_data.negatives.rules.add import Add
from diptych_data.negatives.rules.family import Rule, find_rules
from diptych_data.negatives.rules.order import Order
from diptych_data.negatives.rules.replace import Replace
from diptych_data.negatives.rules.swap import Swap

find_rules()
find_writers()
find_sources()


@dataclass(frozen=True)
class RefineConfig(Config):
    """How negatives are chosen that texts alone do not give away."""

    rounds: int = 8
    """Times a text-only classifier is trained on what is chosen, and what it recognises made rarer; at least 1."""
    drops: int = 6
    """Times that, of a kind still recognised, pairs are dropped until as many are guessed right as wrong."""
    max_bias: float = 0.05
    """By how much the classifier's accuracy for one kind may exceed 0.5 before pairs are dropped; in (0, 0.5)."""
    max_pictures: int = 4000
    """Pictures drawn from the set that the classifier is trained on; what it learns holds for all."""
    min_captions: int = 50
    """Captions that a kind must have to be judged; one with fewer stays as it is."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.drops < 0 or self.max_pictures < 1 or self.min_captions < 10:
            raise ValueError("rounds and max_pictures must be at least 1, drops 0, min_captions 10")
        if not 0 < self.max_bias < 0.5:
            raise ValueError(f"max_bias must lie in (0, 0.5), not {self.max_bias}")


@dataclass(frozen=True)
class NegativesOptions(Config):
    """Which negatives are written."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path
    """Folder for the new shards, one for each of the old."""
    columns: tuple[str, ...] = ("txt",)
    """Captions from which negatives are made; no negative equals a text of any column."""
    column: str = "hard"
    """Column for the negatives, which `data.captions.hard.column` names in training; texts already there stay."""
    per_picture: int = 4
    """Negatives that a picture gets at most; those there already not counted."""
    max_candidates: int = 48
    """Proposals that a picture keeps until the choice is made."""
    rules: tuple[Rule, ...] = (Replace(), Swap(), Add(), Order())
    """Ways without a model."""
    lexicon: Path | None = None
    """JSON of the form of `diptych_data/negatives/lexicon.json`, laid over it."""
    tagger: Literal["none", "textblob"] = "none"
    """Finds nouns that the lexicon does not know; `textblob` needs `diptych[negatives]`."""
    synonyms: Literal["lexicon", "wordnet"] = "lexicon"
    """What else says that two words are alike; `wordnet` needs nltk and its data."""
    language: tuple[Writer, ...] = ()
    """Language models that propose more."""
    plausible: PlausibleConfig | None = None
    """A language model that judges how likely a text is; none: nothing is judged so."""
    positives: tuple[Literal["sub", "paraphrase"], ...] = ("sub", "paraphrase")
    """Further true captions, each kind in a column of its name."""
    images: CounterImages | None = None
    """Where pictures of negatives come from; none: there are none."""
    refine: RefineConfig | None = field(default_factory=RefineConfig)
    """The blind test's part in the choice; none: chosen at random."""
    without: Literal["keep", "drop"] = "keep"
    """Samples for which there is no negative; training skips them where it asks for hard captions."""
    seed: int = 0
    """Of every draw."""
    workers: int | None = None
    """Processes; none: one for each core. Language models run in one."""
    overwrite: bool = False
    """Replace a folder of shards that is already there."""

    def __post_init__(self) -> None:
        if not self.columns or self.column in (*self.columns, "sub", "paraphrase", "txt"):
            raise ValueError("columns must name at least one column, and not the one that is written")
        if self.per_picture < 1 or self.max_candidates < self.per_picture:
            raise ValueError("per_picture must be at least 1 and no more than max_candidates")
        if not self.rules and not self.language:
            raise ValueError("name at least one of rules and language")
