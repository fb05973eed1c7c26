"""The family of adapters: what is added to a finished model and learns in its place. A member is one file here.

@dataclass(frozen=True)
class MyAdapter(Adapter, name="my_adapter"):
    def apply(self, model: DualEncoder) -> None: ...
"""

from typing import TYPE_CHECKING

from diptych.config import Choice

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


class Adapter(Choice):
    """What a finished model is tuned with."""

    def apply(self, model: "DualEncoder") -> None:
        """Adds its parameters, all of them trainable, drawn from torch's default generator; the model's own are frozen
        already. The features stay those of the model where the method says so.

        Raises:
            ConfigError: it does not fit the model.
        """
        raise NotImplementedError

    def merge(self, model: "DualEncoder") -> None:
        """Puts what was learned into the model's own weights, and leaves a model without this adapter.

        Raises:
            ConfigError: it has no place there.
        """
        from diptych.errors import ConfigError

        raise ConfigError(
            f"what {self.choice_name!r} learned is no change of the model's weights · model.adapters · "
            "open the run itself"
        )
