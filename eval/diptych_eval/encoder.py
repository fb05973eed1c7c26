"""What can be measured: anything that turns pictures and texts into unit vectors."""

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.data.images import EvaluationView


class Encoder(Protocol):
    """A model behind two functions."""

    view: EvaluationView
    """How it sees a picture."""
    logit_scale: float
    """Multiplies cosines in its softmax."""
    fingerprint: str
    """Differs between models that give different features."""

    def encode_image(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        """Unit-norm float32 features."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm float32 features."""
        ...

    def read_classes(
        self, image_features: Float[Tensor, "N D"], names: Sequence[str]
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "C K"]] | None:
        """Pictures and classes by prompts of the model's own; None: it has none."""
        ...
