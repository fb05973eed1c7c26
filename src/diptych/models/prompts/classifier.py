"""Classes as rows of numbers: a linear classifier of pictures' features that begins as the classes' names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.plain import NamePrompts, check_templates

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Classifier(ClassAdapter, name="classifier"):
    """A linear classifier that begins as zero-shot (arXiv:2109.01903, section 2):

        logits_b = s·I_b·Wᵀ              W [C, D]: at the start the features of the classes' names, then free

    With frozen towers a linear probe; with `unfrozen: [image_tower]`, held back in a first stage, LP-FT
    (arXiv:2202.10054). The text tower is not read while it learns, and the rows do not stay of unit norm. Names that it
    did not learn from are read by the templates.
    """

    templates: tuple[str, ...] = ("a photo of a {}.",)
    """With `{}` where the name stands; a row starts as its prompts' mean feature, brought to unit norm again."""

    def __post_init__(self) -> None:
        check_templates(self.templates)

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        return ClassifierRows(NamePrompts(self.names, self.templates), model)


class ClassifierRows(ClassPrompts):
    """A row for each class."""

    def __init__(self, by_name: NamePrompts, model: "DualEncoder") -> None:
        super().__init__(by_name.names)
        self.by_name = by_name
        self.rows = nn.Linear(model.embed_dim, len(self.names), bias=False)
        was_training = model.text_tower.training
        model.text_tower.eval()
        with torch.no_grad():
            self.rows.weight.copy_(by_name.features(model, self.names))
        model.text_tower.train(was_training)

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts."""
        return self.by_name.prompts(names)

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts. By the rows where all names have one, in any order; else all by the templates."""
        if tuple(names) == self.names:
            return ClassReading(self.rows.weight, image_features)
        row = {name: number for number, name in enumerate(self.names)}
        if set(names) <= row.keys():
            return ClassReading(self.rows.weight[[row[name] for name in names]], image_features)
        return self.by_name.read(model, image_features, names)
