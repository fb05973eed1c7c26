"""Vectors made from the classes' own features, and pictures that look at the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.context import Context, ContextPrompts, Position, start_vectors
from diptych.models.prompts.family import ClassPrompts, ClassReading

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class ClassAware(Context, name="class_aware"):
    """Context vectors by class, without parameters of each class, and text-guided tuning of the picture's feature.

        v_m(c) = v_m + G_m·N_c              N_c: the class's plain feature, "a photo of a NAME."
        I'_i = norm(I_i + O·Σ_c a_ic V·T_c),   a_i = softmax_c((Q·I_i)·(K·T_c) / sqrt(D))

    T_c: feature of class c under its vectors. G and O start at 0: at the start it is `context`. After
    arXiv:2303.17169; there the tokens of a picture attend to the classes, here its pooled feature does, so that any
    image tower will do.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class:
            raise ValueError("classes have vectors of their own without parameters of their own; leave per_class out")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        start = start_vectors(model, self.words, self.length)
        return ClassAwarePrompts(self.names, start, self.position, width=model.embed_dim)


class ClassAwarePrompts(ContextPrompts):
    """M vectors, what makes those of a class from its feature, and the attention of pictures to classes."""

    def __init__(self, names: Sequence[str], start: Float[Tensor, "M W"], position: Position, *, width: int) -> None:
        super().__init__(names, start, position)
        self.generator = nn.Linear(width, start.numel(), bias=False)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        for layer in (self.generator, self.out):
            nn.init.zeros_(layer.weight)

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts."""
        with torch.no_grad():
            plain = model.encode_text(model.tokenizer([f"a photo of a {name}." for name in names]).to(self._device))
        vectors = self.context.weight + self.generator(plain).unflatten(1, self.context.weight.shape)
        classes = self.encode(model, self.texts(model, names), vectors)
        scores = self.query(image_features) @ self.key(classes).T / classes.shape[1] ** 0.5
        seen = image_features + self.out(scores.softmax(1) @ self.value(classes))
        return ClassReading(classes, F.normalize(seen, dim=-1))

    @property
    def _device(self) -> torch.device:
        return self.context.weight.device
