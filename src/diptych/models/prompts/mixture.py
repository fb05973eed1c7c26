"""Several prompts, of which each picture takes those that suit it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.splice import SLOT, Slotted, slotted, word_ids, word_vectors

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_BOOST = 10.0


@dataclass(frozen=True)
class Mixture(ClassAdapter, name="mixture"):
    """A mixture of G prompts with a router on the picture's feature (arXiv:2409.12011).

        r_b  = W·I_b + b                                      [G]
        w_b  = softmax over the `top_k` largest of r_b, 0 for the others
        x_bc = sum_g w_bg · I_b·T_gc                          what the classification term takes
        l_bc = gate_weight · CE(r_b, softmax_g(z_bgc + 10·[z_bgc among the top_k])) + text_weight · t
        z_bgc = I_b·H_gc,   t = mean_gc CE(T_gc·H_g, c)

    T_gc: feature of class c by prompt g, whose vectors start as the words of the group's first template.
    H_gc: mean of the features of class c by the group's templates, of unit norm. The scale of t (none) and the 10 are
    those of the authors' code.
    """

    groups: tuple[tuple[str, ...], ...]
    """Templates that say the same in other words, such as `[[a photo of a {}.], [a drawing of {}., a sketch of {}.]]`:
    one prompt is learned for each group."""
    top_k: int = 2
    """Prompts that a picture takes."""
    gate_weight: float = 1.0
    """Of the router's nearness to the templates."""
    text_weight: float = 5.0
    """Of the prompts' nearness to the templates."""

    def __post_init__(self) -> None:
        if any(not group for group in self.groups):
            raise ValueError("groups must hold at least one template each")
        if any(template.count("{}") != 1 for group in self.groups for template in group):
            raise ValueError("groups must hold templates with one {} for the name")
        if not 1 <= self.top_k <= len(self.groups):
            raise ValueError(f"top_k must lie in [1, {len(self.groups)}], the number of groups, not {self.top_k}")

    @property
    def templates(self) -> tuple[str, ...]:
        """Those of all groups."""
        return tuple(template for group in self.groups for template in group)

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter. Raises ConfigError for a template of the name alone, or one that is too long."""
        slotted(model.tokenizer, [template.replace("{}", name) for name in self.names for template in self.templates])
        return MixturePrompts(self.names, self, [_soft(model, group[0]) for group in self.groups], model.embed_dim)


@dataclass(frozen=True)
class SoftTemplate:
    """A template with a vector in the place of each of its tokens."""

    written: str
    """With `{}` for the name and `SLOT`s for the vectors."""
    start: Float[Tensor, "M W"]


def _soft(model: "DualEncoder", template: str) -> SoftTemplate:
    # The full stop behind the last word stays: as in `context`, it belongs to the sentence.
    before, after = template.removesuffix(".").split("{}")
    counts = [len(word_ids(model.tokenizer, part)) for part in (before, after)]
    if not sum(counts):
        raise ConfigError(f"no word beside the name in {template!r} · model.adapters: groups · write a template")
    start = torch.cat([word_vectors(model.text_tower, model.tokenizer, part).cpu() for part in (before, after)])
    words = [*[SLOT] * counts[0], "{}", *[SLOT] * counts[1]]
    return SoftTemplate(" ".join(words) + "." * template.endswith("."), start)


class MixturePrompts(ClassPrompts):
    """The vectors of all groups, and the router."""

    def __init__(self, names: Sequence[str], config: Mixture, soft: Sequence[SoftTemplate], dim: int) -> None:
        super().__init__(names)
        self.config = config
        self.written = tuple(one.written for one in soft)
        self.lengths = tuple(len(one.start) for one in soft)
        self.context = nn.Embedding.from_pretrained(torch.cat([one.start for one in soft]), freeze=False)
        self.router = nn.Linear(dim, len(soft))
        self._groups: tuple[tuple[str, ...], list[Slotted]] | None = None

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts. The mixture is linear in the picture: its rows are those of the pictures, weighted, side by
        side, [B, G·D], and so are the classes'; products are the mixed cosines, the pictures' rows not of unit norm."""
        prompts = self.texts_of_groups(model, names)
        parts = self.context.weight.split(self.lengths)
        texts = torch.stack(
            [self.encode(model, one, part.expand(len(names), -1, -1)) for one, part in zip(prompts, parts, strict=True)]
        )
        routes = self.router(image_features).float()
        chosen = routes.topk(self.config.top_k, dim=1)
        weights = torch.zeros_like(routes).scatter(1, chosen.indices, chosen.values.softmax(1))
        pictures = (weights[:, :, None] * image_features[:, None]).flatten(1)
        losses = self._losses(self._templates(model, names), texts, routes, image_features) if self.training else None
        return ClassReading(texts.transpose(0, 1).flatten(1), pictures, losses)

    def _losses(
        self,
        templates: Float[Tensor, "G C D"],
        texts: Float[Tensor, "G C D"],
        routes: Float[Tensor, "B G"],
        image_features: Float[Tensor, "B D"],
    ) -> Float[Tensor, "B C"]:
        with torch.autocast(texts.device.type, enabled=False):
            near = torch.einsum("bd,gcd->bcg", image_features.detach(), templates)
            best = near.topk(self.config.top_k, dim=2).indices
            target = near.scatter_add(2, best, torch.full_like(near, _BOOST)).softmax(2)
            gate = -(target * routes.log_softmax(1)[:, None]).sum(2)
            own = torch.einsum("gcd,ged->gce", texts, templates).log_softmax(2).diagonal(dim1=1, dim2=2)
        return self.config.gate_weight * gate - self.config.text_weight * own.mean()

    def _templates(self, model: "DualEncoder", names: Sequence[str]) -> Float[Tensor, "G C D"]:
        """What the templates of each group say of each class."""
        texts = [template.replace("{}", name) for template in self.config.templates for name in names]
        sizes = [len(group) for group in self.config.groups]
        parts = self.fixed(model, texts).unflatten(0, (-1, len(names))).split(sizes)
        return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)

    def texts_of_groups(self, model: "DualEncoder", names: Sequence[str]) -> list[Slotted]:
        """Token ids of all classes by each group's prompt; made once."""
        key = tuple(names)
        if self._groups is None or self._groups[0] != key:
            written = [[one.replace("{}", name) for name in key] for one in self.written]
            self._groups = (key, [slotted(model.tokenizer, texts) for texts in written])
        return [one.to(model.logit_scale.device) for one in self._groups[1]]

    def texts(self, model: "DualEncoder", names: Sequence[str]) -> Slotted:
        """See ClassPrompts: by the first group's prompt."""
        return self.texts_of_groups(model, names)[0]

    def vectors(self) -> dict[str, Float[Tensor, "M W"]]:
        """See ClassPrompts."""
        parts = self.context.weight.split(self.lengths)
        return {group[0]: part for group, part in zip(self.config.groups, parts, strict=True)}
