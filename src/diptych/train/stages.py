"""Whether a model takes what the stages of a run bring it."""

from collections.abc import Sequence

from diptych.data.stages import Stage
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers.resize import accept_sizes


def prepare(model: DualEncoder, stages: Sequence[Stage]) -> None:
    """Lets the image tower take the sizes of all stages. Before the model is copied, divided or wrapped.

    Raises:
        ConfigError: it cannot, or captions of such a length cannot be had.
    """
    longest = model.tokenizer.context_length
    for number, stage in enumerate(stages):
        if stage.context_length is not None and stage.context_length > longest:
            raise ConfigError(
                f"context_length ({stage.context_length}) exceeds the model's ({longest}) · stages.{number} · "
                "lower it, or leave it out"
            )
        if stage.context_length not in (None, longest) and model.tokenizer([""])[0, -1] != 0:
            raise ConfigError(
                f"the tokenizer pads with another id than 0, captions cannot be cut · stages.{number}.context_length · "
                "leave it out"
            )
    sizes = {stage.image_size for stage in stages if stage.image_size is not None}
    if sizes - {model.image_size}:
        accept_sizes(model.image_tower, sorted(sizes))
