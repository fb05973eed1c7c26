"""How captions are written."""

from dataclasses import dataclass
from typing import Literal

from diptych.config import Config


@dataclass(frozen=True)
class GenerateConfig(Config):
    """How captions are written."""

    method: Literal["greedy", "beam", "sample", "contrastive"] = "beam"
    """`greedy`: the likeliest word each time; `beam`: of several captions at once the likeliest; `sample`: words drawn
    by their probability; `contrastive`: likely words unlike those before (arXiv:2202.06417)."""
    max_length: int = 30
    """Tokens of a caption at most, its end among them; never more than the model's context has room for."""
    min_length: int = 0
    """Tokens before the end, at least."""
    beams: int = 5
    """Captions that are followed at once (beam)."""
    length_penalty: float = 1.0
    """Captions are compared by their log-probability over (length ** this); 0: by the log-probability itself (beam)."""
    temperature: float = 1.0
    """Log-probabilities are divided by it before words are drawn (sample)."""
    top_k: int = 0
    """Only so many of the likeliest words are drawn from; 0: all (sample)."""
    top_p: float = 1.0
    """Only the likeliest words that together have this probability are drawn from (sample; arXiv:1904.09751)."""
    seed: int = 0
    """Of the draws: a picture's depend on it and on the picture's number alone (sample)."""
    candidates: int = 5
    """The likeliest words among which is chosen (contrastive)."""
    penalty: float = 0.6
    """α: how much it counts against a word that it is like one before, in [0, 1]; 0 is greedy (contrastive)."""
    layer_contrast: int | None = None
    """A layer of the decoder, from 1, below its last: words gain by what the layers above it add to their
    log-probability (arXiv:2309.03883). Any method; none: the last layer alone."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("min_length", 0), ("beams", 1), ("top_k", 0), ("candidates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.min_length >= self.max_length:
            raise ValueError(f"min_length ({self.min_length}) must be below max_length ({self.max_length})")
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty must be at least 0, not {self.length_penalty}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.penalty <= 1:
            raise ValueError(f"penalty must lie in [0, 1], not {self.penalty}")
        if self.layer_contrast is not None and self.layer_contrast < 1:
            raise ValueError(f"layer_contrast must be at least 1, not {self.layer_contrast}")
