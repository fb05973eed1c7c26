"""Several prompts, and a router that chooses among them by the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.context import start_vectors
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.splice import SLOT, Slotted, slotted

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_DEFAULT = (("a photo of a {}.", "a picture of a {}."), ("a drawing of a {}.", "a painting of a {}."))


@dataclass(frozen=True)
class Mixture(ClassAdapter, name="mixture"):
    """A prompt for each group of templates, mixed by a router on the picture (arXiv:2409.12011).

        z_ic = s·I_i·Σ_g p_ig T_gc          p_i: softmax of R·I_i over the `top` groups, the others 0

    T_gc: feature of class c under group g's vectors. Beside the right class each picture asks for
    gate: KL(q_i ‖ softmax(R·I_i)), q_i: softmax over groups of s·I_i·mean_c H_gc, H: the templates' own features;
    text: mean over groups of the cross-entropy of s·T_gy·H_g over the classes, y the right one: vectors stay near
    their templates.
    """

    templates: tuple[tuple[str, ...], ...] = _DEFAULT
    """Groups of templates, each with `{}` where the name stands; a group's vectors start from the words of its first,
    which must stand before the name."""
    top: int = 2
    """Groups that a picture is read with."""
    gate_weight: float = 1.0
    """Of the gate's loss."""
    text_weight: float = 1.0
    """Of the loss that holds vectors near their templates."""

    def __post_init__(self) -> None:
        if len(self.templates) < 2 or any("{}" not in text for group in self.templates for text in group or ("",)):
            raise ValueError("templates must hold at least two groups, each template with {} for the name")
        if not 1 <= self.top <= len(self.templates):
            raise ValueError(f"top must lie between 1 and the number of groups, not {self.top}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        starts = [start_vectors(model, group[0].partition("{}")[0], 1) for group in self.templates]
        return MixturePrompts(self, starts, model.embed_dim)


class MixturePrompts(ClassPrompts):
    """Vectors of each group, and the router."""

    conditional: ClassVar[bool] = True

    def __init__(self, config: Mixture, starts: Sequence[Float[Tensor, "M W"]], image_dim: int) -> None:
        super().__init__(config.names)
        self.config = config
        self.contexts = nn.ModuleList([nn.Embedding.from_pretrained(start, freeze=False) for start in starts])
        self.longest = max(len(start) for start in starts)
        self.router = nn.Linear(image_dim, len(starts), bias=False)
        nn.init.zeros_(self.router.weight)  # all groups alike at the start

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts: those of the longest group, to see whether they fit."""
        return [f"{' '.join([SLOT] * self.longest)} {name}." for name in names]

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts; what it gives for a picture is a mean of unit vectors."""
        soft = torch.stack([self._soft(model, names, number) for number in range(len(self.contexts))])
        scores = self.router(image_features)
        kept = scores.topk(self.config.top, dim=1)
        shares = torch.zeros_like(scores).scatter(1, kept.indices, kept.values.softmax(1))
        features = torch.einsum("bg,gcd->bcd", shares, soft)
        if not self.training:
            return ClassReading(features, image_features)
        with torch.no_grad():
            hard = torch.stack([self._hard(model, names, group) for group in self.config.templates])
        scale = model.logit_scale.exp().detach()
        wanted = (scale * image_features @ hard.mean(1).T).softmax(1)
        gate = F.kl_div(scores.log_softmax(1), wanted, reduction="none").sum(1)
        classes = torch.arange(len(names), device=soft.device)
        logits = scale * torch.einsum("gcd,gkd->gck", soft, hard)
        text = F.cross_entropy(logits.flatten(0, 1), classes.repeat(len(soft)))
        losses = self.config.gate_weight * gate + self.config.text_weight * text
        return ClassReading(features, image_features, losses)

    def _soft(self, model: "DualEncoder", names: Sequence[str], number: int) -> Float[Tensor, "C D"]:
        vectors: Tensor = self.contexts[number].weight  # type: ignore[assignment]
        prompts = self._known(model, tuple(f"{' '.join([SLOT] * len(vectors))} {name}." for name in names))
        return self.encode(model, prompts, vectors.expand(len(names), -1, -1))

    def _hard(self, model: "DualEncoder", names: Sequence[str], group: Sequence[str]) -> Float[Tensor, "C D"]:
        prompts = self._known(model, tuple(template.format(name) for name in names for template in group))
        features = model.encode_text(prompts.tokens).unflatten(0, (len(names), len(group)))
        return F.normalize(features.mean(1), dim=-1)

    def _known(self, model: "DualEncoder", prompts: tuple[str, ...]) -> Slotted:
        """Token ids, made once."""
        if prompts not in self._slotted:
            self._slotted[prompts] = slotted(model.tokenizer, prompts)
        return self._slotted[prompts].to(model.logit_scale.device)
