"""Prompts of classes: texts with learned vectors in them, one per class, in place of words that people wrote.

A kind of prompt is one file here: a frozen dataclass of its YAML keys, a member of the family of adapters, and the
module that it builds, with `read`.

@dataclass(frozen=True)
class MyPrompts(ClassAdapter, name="my_prompts"):
    def build(self, model: DualEncoder) -> ClassPrompts: ...
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.adapters.family import Adapter
from diptych.models.prompts.splice import Slotted, slotted, spliced

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_AT_ONCE = 1024
"""Texts of one pass of the tower where nothing learns."""


class ClassReading(NamedTuple):
    """The classes as a model reads them."""

    features: Float[Tensor, "C D"] | Float[Tensor, "B C D"]
    """Unit norm; of each picture its own where the prompts depend on it."""
    image_features: Float[Tensor, "B D"]
    """Unit norm: those that came, unless the classes change how a picture is seen."""
    losses: Float[Tensor, "B C"] | None = None
    """What the method asks of a picture beside the right class, for whichever class that is."""

    def logits(self, logit_scale: Float[Tensor, ""]) -> Float[Tensor, "B C"]:
        """Of each picture and class."""
        equation = "bd,cd->bc" if self.features.ndim == 2 else "bd,bcd->bc"
        return logit_scale * torch.einsum(equation, self.image_features, self.features)


class ClassPrompts(nn.Module):
    """The learned part of some prompts. The tower that reads them stays where it is, in the model."""

    conditional: bool = False
    """Whether what a class is depends on the picture: then it is read again for each batch of pictures."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        """Of the classes that are learned from, in the order of their labels."""
        self._slotted: dict[tuple[str, ...], Slotted] = {}
        self._fixed: tuple[tuple[str, ...], Tensor] | None = None

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """What some classes are to some pictures.

        Args:
            names: those of `self.names` in training; others where a method can read classes that it was not trained on.

        Raises:
            ConfigError: it cannot.
        """
        raise NotImplementedError

    def prompts(self, names: Sequence[str]) -> list[str]:
        """The texts of classes, with as many `SLOT`s in each, wherever a vector belongs."""
        raise NotImplementedError

    def texts(self, model: "DualEncoder", names: Sequence[str]) -> Slotted:
        """The same as token ids; made once."""
        key = tuple(names)
        if key not in self._slotted:
            self._slotted = {key: slotted(model.tokenizer, self.prompts(key))}
        return self._slotted[key].to(model.logit_scale.device)

    def encode(self, model: "DualEncoder", prompts: Slotted, vectors: Float[Tensor, "N M W"]) -> Float[Tensor, "N D"]:
        """Unit-norm float32 features of prompts with vectors in their places."""
        return F.normalize(spliced(model.text_tower, prompts, vectors).float(), dim=-1)

    @torch.no_grad()
    def fixed(self, model: "DualEncoder", texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm features of plain texts, through which nothing learns. Remembered in training while the text tower
        stays as it is."""
        key = tuple(texts)
        learns = any(parameter.requires_grad for parameter in model.text_tower.parameters())
        if self._fixed is not None and self._fixed[0] == key and self.training and not learns:
            return self._fixed[1]
        tokens = slotted(model.tokenizer, key).tokens.to(model.logit_scale.device)
        features = torch.cat([model.encode_text(rows) for rows in tokens.split(_AT_ONCE)])
        # Not of a copy that is averaged: nothing in it learns, and it moves all the same. It is never in training.
        self._fixed = (key, features) if self.training and not learns else None
        return features

    def vectors(self) -> dict[str, Float[Tensor, "M W"]]:
        """What is learned and stands among words, by what it stands for."""
        return {}


@dataclass(frozen=True)
class ClassAdapter(Adapter):
    """What all prompts of classes share."""

    classes: tuple[str, ...] | Path
    """Names of the classes in the order of their numbers (`data.labels`), or a file with one per line."""

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where the model has prompts already, is no plain pair of towers, or its texts
        are too short for the prompts."""
        if model.class_prompts is not None:
            raise ConfigError("the model has prompts of classes already · model.adapters · leave one of them out")
        if model.text_decoder is not None:
            raise ConfigError("a captioner's texts have other ends · model.adapters · use a model without decoder")
        prompts = self.build(model)
        prompts.texts(model, prompts.names)  # told now, not at the first step
        model.class_prompts = prompts

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """The module with what is learned."""
        raise NotImplementedError

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes. Raises ConfigError where there are fewer than two, or one stands there twice."""
        names = listed(self.classes, "classes")
        if len(names) < 2:
            raise ConfigError(f"{len(names)} classes · model.adapters: classes · there must be two to tell apart")
        return names


def listed(names: tuple[str, ...] | Path, key: str) -> tuple[str, ...]:
    """Names from settings, or from a file with one per line. Raises ConfigError where one stands there twice."""
    found: Sequence[str] = ()
    if isinstance(names, Path):
        try:
            found = [line.strip() for line in names.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"not readable ({error}) · model.adapters: {key} · one name per line") from error
    else:
        found = names
    kept = tuple(name for name in found if name.strip())
    if twice := next((name for name, count in Counter(kept).items() if count > 1), None):
        raise ConfigError(f"{twice!r} stands there twice · model.adapters: {key} · leave one out")
    return kept
