"""Captions written word by word: greedy, beam, sampled, or by contrastive search."""

from diptych.generate.settings import GenerateConfig
from diptych.generate.write import captions, write

__all__ = ["GenerateConfig", "captions", "write"]
