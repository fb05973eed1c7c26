"""One optimizer step."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.data.batch import Batch
from diptych.distributed.wrap import Engine
from diptych.losses import objective
from diptych.losses.objective import Pairs, Terms
from diptych.optim import optimizers, schedules
from diptych.seeding import derive
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What a step reports; the tensors stay on the device until somebody reads them."""

    terms: Terms
    grad_norm: Tensor
    lr: float


def run(recipe: Recipe, engine: Engine, model: nn.Module, state: TrainState, batch: Batch) -> StepResult:
    """Forward, loss, backward, clip, update. Every rank must call.

    Args:
        model: `state.model` as the engine wrapped it.
    """
    lr = recipe.optim.peak_lr * schedules.factor(recipe.optim.schedule, state.samples_seen, recipe.total_samples)
    optimizers.set_lr(state.optimizer, lr)
    # Dropout draws from torch's generator: keyed by position, a resumed run drops what the unbroken one drops.
    torch.manual_seed(derive(recipe.seed, "step", state.step, engine.ranks.rank))
    terms = _forward(recipe, engine, model, batch)
    engine.backward(terms.total)
    grad_norm = _clip(recipe.optim.grad_clip_norm, state.model)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.model.clamp_logit_scale()
    if state.ema is not None:
        state.ema.update(state.model)
    state.advance(samples=recipe.global_batch, cursors=batch.cursors)
    return StepResult(terms, grad_norm, lr)


def _forward(recipe: Recipe, engine: Engine, model: nn.Module, batch: Batch) -> Terms:
    device = engine.device
    images = batch.images.to(device, non_blocking=True)
    tokens = batch.tokens.to(device, non_blocking=True)
    with engine.autocast():
        embeddings = model(images, tokens)
    # Outside autocast: logits of a low-precision product would lose the differences that the loss is made of.
    pairs = Pairs(**embeddings._asdict(), caption_ids=batch.caption_ids.to(device, non_blocking=True))
    return objective.evaluate(recipe.objective, pairs, engine.ranks)


def _clip(max_norm: float | None, model: nn.Module) -> Tensor:
    """The norm of the whole gradient before clipping."""
    limit = max_norm if max_norm is not None else float("inf")
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
