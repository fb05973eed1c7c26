"""The image tower of one source beside the text tower of another."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.towers.family import BuiltTowers, Towers


@dataclass(frozen=True)
class PairTowers(Towers, name="pair"):
    """Two towers that were not made for each other, such as a trained image tower and a new text tower (LiT,
    arXiv:2111.07991)."""

    image: Towers
    """Whose image tower it is; pixels are prepared as it wants them."""
    text: Towers
    """Whose text tower and tokenizer they are."""
    embed_dim: int | None = None
    """Width D of the shared space; a tower of another width gets a new linear layer behind it, `image_tower.projection`
    or `text_tower.projection`; what it came with is `image_tower.tower`, `text_tower.tower`. None: that of both
    towers, which must be equal."""

    def __post_init__(self) -> None:
        if self.embed_dim is not None and self.embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, not {self.embed_dim}")

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError where widths differ and `embed_dim` is not given."""
        image, text = self.image.build(), self.text.build()
        for tower in (image.image_tower, text.text_tower):
            if getattr(tower, "output_tokens", False):  # a captioner's: here there is no decoder that takes them
                tower.output_tokens = False  # type: ignore[assignment]  # a plain attribute
        if self.embed_dim is None and image.embed_dim != text.embed_dim:
            raise ConfigError(
                f"the towers' features have {image.embed_dim} and {text.embed_dim} numbers · model.towers · "
                "give embed_dim, the width they are projected to"
            )
        width = self.embed_dim if self.embed_dim is not None else image.embed_dim
        return BuiltTowers(
            image_tower=ProjectedTower(image.image_tower, _projection(image.embed_dim, width)),
            text_tower=ProjectedTower(text.text_tower, _projection(text.embed_dim, width)),
            tokenizer=text.tokenizer,
            embed_dim=width,
            pixels=image.pixels,
            logit_scale=None,
            logit_bias=None,
            open_clip_config=None,
        )


class ProjectedTower(nn.Module):
    """A tower and what brings its features to the width of the shared space."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection

    def train(self, mode: bool = True) -> Self:
        """As torch's; a tower without anything to train stays as it is used, while its projection learns."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """What the tower takes, to features [B, D]."""
        return self.projection(self.tower(inputs))


def _projection(width: int, wanted: int) -> nn.Module:
    return nn.Linear(width, wanted, bias=False) if width != wanted else nn.Identity()
