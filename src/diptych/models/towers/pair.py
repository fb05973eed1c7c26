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
    """Width D of the shared space; a tower of another width gets a new linear layer, `projection`, behind it. None:
    that of both towers, which must be equal."""

    def __post_init__(self) -> None:
        if self.embed_dim is not None and self.embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, not {self.embed_dim}")

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError where widths differ and `embed_dim` is not given."""
        image, text = self.image.build(), self.text.build()
        if self.embed_dim is None and image.embed_dim != text.embed_dim:
            raise ConfigError(
                f"the towers' features have {image.embed_dim} and {text.embed_dim} numbers · model.towers · "
                "give embed_dim, the width they are projected to"
            )
        width = self.embed_dim if self.embed_dim is not None else image.embed_dim
        return BuiltTowers(
            image_tower=_projected(image.image_tower, image.embed_dim, width),
            text_tower=_projected(text.text_tower, text.embed_dim, width),
            tokenizer=text.tokenizer,
            embed_dim=width,
            image_size=image.image_size,
            image_mean=image.image_mean,
            image_std=image.image_std,
            logit_scale=None,
            logit_bias=None,
            open_clip_config=None,
        )


class ProjectedTower(nn.Module):
    """A tower and a linear layer behind it."""

    def __init__(self, tower: nn.Module, projection: nn.Linear) -> None:
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


def _projected(tower: nn.Module, width: int, wanted: int) -> nn.Module:
    """The tower itself where its width is the one wanted."""
    return tower if width == wanted else ProjectedTower(tower, nn.Linear(width, wanted, bias=False))
