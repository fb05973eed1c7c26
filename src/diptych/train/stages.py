"""Whether a model takes what the stages of a run bring it, and what learns in them."""

from collections.abc import Sequence

from torch import nn

from diptych import names
from diptych.data.stages import Stage, stage_at
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers.resize import accept_sizes


def prepare(model: DualEncoder, stages: Sequence[Stage]) -> None:
    """Lets the image tower take the sizes of all stages. Before the model is copied, divided or wrapped.

    Raises:
        ConfigError: it cannot, captions of such a length cannot be had, or what is frozen is nothing that learns, or
            all of it.
    """
    _check_frozen(model, stages)
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


def _check_frozen(model: DualEncoder, stages: Sequence[Stage]) -> None:
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for number, stage in enumerate(stages):
        names.check(stage.frozen, learning, where=f"stages.{number}.frozen")
        if all(_is_in(stage.frozen, name) for name in learning):
            raise ConfigError(f"no parameter is left to train · stages.{number}.frozen · leave something out")


class Thaw:
    """What learns at a point of a run: all that the optimizer has but what the stage there freezes."""

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        """Before the first step, while everything learns that ever will."""
        self._model, self._stages = model, stages
        self._learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._frozen: tuple[str, ...] = ()

    def at(self, slot: int) -> None:
        """Makes it so for the batch that begins at this slot. What is frozen has no gradient, so the optimizer leaves
        it and its averages as they are."""
        stage = stage_at(slot, self._stages)
        frozen = stage.frozen if stage is not None else ()
        if frozen == self._frozen:
            return
        for name, parameter in self._learning:
            parameter.requires_grad_(not _is_in(frozen, name))
        self._frozen = frozen
        self._model.train()  # a tower that does not learn stays as it is used


def _is_in(frozen: Sequence[str], name: str) -> bool:
    return any(names.begins(name, prefix) for prefix in frozen)
