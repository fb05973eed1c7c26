"""Classes as templates and names alone: what a tower is tuned against when it is not the prompts that learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class ClassNames(ClassAdapter, name="class_names"):
    """Every step reads the names of all classes: for LoRA or whole towers that learn to tell classes apart (CLIP-LoRA,
    arXiv:2405.18541)."""

    templates: tuple[str, ...] = ("a photo of a {}.",)
    """With `{}` where the name stands; a class's feature is the mean of its prompts', brought to unit norm again."""

    def __post_init__(self) -> None:
        check_templates(self.templates)

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        return NamePrompts(self.names, self.templates)

    def merge(self, model: "DualEncoder") -> None:
        """See Adapter: nothing was learned here."""
        model.class_prompts = None


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError where there are none, or one has no place for the name."""
    if not templates or any("{}" not in template for template in templates):
        raise ValueError("templates must hold at least one, each with {} for the name")


class NamePrompts(ClassPrompts):
    """Nothing to learn."""

    def __init__(self, names: Sequence[str], templates: tuple[str, ...]) -> None:
        super().__init__(names)
        self.templates = templates

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts."""
        return [template.replace("{}", name) for name in names for template in self.templates]

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts."""
        return ClassReading(self.features(model, names), image_features)

    def features(self, model: "DualEncoder", names: Sequence[str]) -> Float[Tensor, "C D"]:
        """Of unit norm, whatever the picture."""
        features = model.encode_text(self.texts(model, names).tokens).unflatten(0, (len(names), len(self.templates)))
        return F.normalize(features.mean(1), dim=-1)
