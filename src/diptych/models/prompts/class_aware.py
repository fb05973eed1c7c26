"""Prompts that their class's name makes, and pictures that look at the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.conditional import MetaNet, each
from diptych.models.prompts.context import ContextPrompts, start_vectors
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class ClassAware(ClassAdapter, name="class_aware"):
    """Class-aware text prompts and text-guided tuning of pictures (arXiv:2303.17169), on the towers' features.

        v_m(c) = v_m + h(u_c)                            u_c: feature of the class's name, or u_c * I_b, see `cue`
        T_c    = feature of "[v_1(c)] ... [v_M(c)] NAME."
        a_bc   = softmax_c((Q·I_b)·(K·T_c) / sqrt(D))
        I'_b   = normalised I_b + V·sum_c a_bc·T_c       the picture, drawn to what the classes say

    h is the small network of `conditional_context`. Its last layer and V start at 0: the first features are those of
    the words and of the pictures alone. The paper lets the tokens of a picture attend, inside the tower and out; here
    it is the picture's one feature, so that pictures are embedded once and compared with any classes afterwards.
    """

    length: int = 4
    """M, vectors of a prompt; where `words` are given, as many as they have tokens."""
    words: str | None = "a photo of a"
    """What the vectors are at the start; none: small random numbers."""
    template: str = "a photo of a {}."
    """By which the name of a class is read for u_c."""
    cue: Literal["name", "name_and_picture"] = "name"
    """What makes a prompt: the class's name, or its product with the picture, number by number: what in the picture
    speaks of the class. The latter reads all classes for each picture, B·C texts per step."""
    reduction: int = 16
    """The network's inner layer is so many times narrower than a feature."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.reduction < 1:
            raise ValueError(f"length and reduction must be at least 1, not {self.length} and {self.reduction}")
        if self.template.count("{}") != 1:
            raise ValueError(f"template must hold one {{}} for the name, not {self.template!r}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        start = start_vectors(model, self.words, self.length)
        return ClassAwarePrompts(self.names, start, self, model.embed_dim)


class ClassAwarePrompts(ContextPrompts):
    """The vectors, what shifts them, and the attention of pictures."""

    def __init__(self, names: Sequence[str], start: Float[Tensor, "M W"], config: ClassAware, dim: int) -> None:
        super().__init__(names, start, "front")
        self.template = config.template
        self.conditional = config.cue == "name_and_picture"
        self.meta_net = MetaNet(dim, start, config.reduction)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        nn.init.zeros_(self.value.weight)

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts."""
        texts = self.texts(model, names)
        cues = self.fixed(model, [self.template.replace("{}", name) for name in names])
        if self.conditional:
            cues = cues * image_features[:, None]
        vectors = self.context.weight + self.meta_net(cues)[..., None, :]
        features = each(self, model, texts, vectors) if self.conditional else self.encode(model, texts, vectors)
        return ClassReading(features, self.tuned(image_features, features))

    def tuned(
        self, image_features: Float[Tensor, "B D"], features: Float[Tensor, "C D"] | Float[Tensor, "B C D"]
    ) -> Float[Tensor, "B D"]:
        """Pictures that have looked at the classes; unit norm, float32."""
        seen = features if features.ndim == 3 else features[None]
        scores = (self.key(seen) @ self.query(image_features)[:, :, None])[..., 0] / image_features.shape[-1] ** 0.5
        drawn = (scores.float().softmax(-1)[:, None] @ seen)[:, 0]
        return F.normalize(image_features + self.value(drawn).float(), dim=-1)
