"""A model without its adapters, and with what they learned."""

from dataclasses import replace

from diptych.models.dual_encoder import DualEncoder


def merged(model: DualEncoder) -> DualEncoder:
    """The same model, changed in place: the same features from weights of the base's own form, all of them trainable.

    Raises:
        ConfigError: what an adapter learned is no change of weights (a prompt is none).
    """
    for adapter in reversed(model.config.adapters):
        adapter.merge(model)
    model.config = replace(model.config, adapters=(), unfrozen=(), frozen=())
    return model.requires_grad_()
