"""One optimizer step."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from diptych.data.batch import Batch
from diptych.distributed.collectives import average_gradients
from diptych.distributed.wrap import Engine
from diptych.errors import DataError
from diptych.losses.accumulate import Features, RandomState, accumulate, gradient_sync
from diptych.losses.batch import Moment, Pairs
from diptych.losses.objective import Terms
from diptych.losses.plugs.weights.inverse_propensity import surface_features
from diptych.models.dual_encoder import DualEncoder, Embeddings
from diptych.models.matching import DecoderTexts, WrongPairs
from diptych.models.patch_dropout import keep_all_patches
from diptych.optim import optimizers, schedules
from diptych.seeding import derive
from diptych.train import meters, partners
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What a step reports; the tensors stay on the device until somebody reads them."""

    terms: Terms
    grad_norm: Tensor
    lr: float
    figures: dict[str, Tensor] = field(default_factory=dict)
    """What else there is to log, by its name in metrics.jsonl; empty where the step is not logged."""


def run(recipe: Recipe, engine: Engine, state: TrainState, batch: Batch) -> StepResult:
    """Forward, loss, backward, clip, update. Every rank must call."""
    lr = recipe.optim.peak_lr * schedules.factor(recipe.optim.schedule, state.samples_seen, recipe.total_samples)
    optimizers.set_lr(state.optimizer, lr)
    if recipe.unmasked_tail_samples:
        tail = recipe.total_samples - recipe.unmasked_tail_samples
        keep_all_patches(state.model, whole=state.samples_seen >= tail)
    # Dropout draws from torch's generator: keyed by position, a resumed run drops what the unbroken one drops.
    torch.manual_seed(derive(recipe.seed, "step", state.step, engine.ranks.rank))
    moment = Moment(state.step, state.samples_seen, recipe.seed)
    pairs, terms = _gradients(recipe, engine, state, batch, moment)
    average_gradients(state.objective.parameters())
    figures = meters.inside_step(recipe, state.step + 1, state.model, pairs)
    modules = (state.model, state.objective)
    with record_function("diptych.optimizer"):
        update = optimizers.update(state.optimizer, modules, recipe.optim.grad_clip_norm, state.guard.judge)
    with record_function("diptych.after"):
        if not state.objective.remembers or not bool(update.left_out):  # no NaN must get into queues and tables
            state.objective.after_step(pairs)
        state.model.clamp_logit_scale()
        if state.ema is not None:
            state.ema.update(state.model)
    state.advance(batch, samples=recipe.global_batch)
    # Detached, or the graph would outlive the step.
    return StepResult(Terms(terms.total.detach(), terms.scalars), update.grad_norm, lr, figures)


@dataclass(frozen=True)
class _Inputs:
    """Pictures and tokens of some rows, on the device."""

    images: Tensor
    tokens: Tensor
    hard_tokens: Tensor | None
    """Hard captions, and behind them further right ones."""
    second_tokens: Tensor | None
    teacher_tokens: Tensor | None
    labels: Tensor | None
    counter_images: Tensor | None
    counter_tokens: Tensor | None
    wrong: WrongPairs | None = None

    def with_counters(self) -> tuple[Tensor, Tensor]:
        """Pictures and tokens, those of counter-images behind all others: one pass for both."""
        if self.counter_images is None or self.counter_tokens is None:
            return self.images, self.tokens
        return torch.cat([self.images, self.counter_images]), torch.cat([self.tokens, self.counter_tokens])


def _apart(found: Embeddings, count: int) -> dict[str, Any]:
    """The first `count` rows as what they are, the rest as counter-images."""
    features = found._asdict()
    for name in ("caption_losses", "caption_lengths", "match_right"):
        features[name] = features[name][:count] if features[name] is not None else None
    counters = {"counter_images": found.image_features[count:], "counter_texts": found.text_features[count:]}
    own = {"image_features": found.image_features[:count], "text_features": found.text_features[:count]}
    return features | own | counters


def _told_apart(features: Features, num_hard: int) -> dict[str, Any]:
    """Hard captions and further right ones each by their name."""
    both = features["hard_captions"]
    if both is None:
        return dict(features)
    hard, positive = both[:, :num_hard], both[:, num_hard:]
    given = {"hard_captions": hard, "positive_captions": positive}
    return {**features, **{name: some if some.shape[1] else None for name, some in given.items()}}


def _gradients(recipe: Recipe, engine: Engine, state: TrainState, batch: Batch, moment: Moment) -> tuple[Pairs, Terms]:
    """The loss of this rank's rows, and gradients in the parameters."""
    device = engine.device
    parts = _parts(batch, device, recipe.micro_batch or len(batch.images))
    known, image_known, text_known = _known(engine, state, batch, parts)
    if state.objective.config.wants_matching:
        parts = _with_wrong_pairs(engine, state, parts, known["caption_ids"], moment)

    def embed(inputs: _Inputs) -> Features:
        with engine.autocast(), record_function("diptych.forward"):
            asked = state.objective.config.caption
            images, tokens = inputs.with_counters()
            further = DecoderTexts(inputs.second_tokens, inputs.wrong)
            found = state.wrapped(images, tokens, inputs.hard_tokens, asked, inputs.labels, further)
            return found._asdict() if images is inputs.images else _apart(found, len(inputs.images))

    def loss(features: Any) -> tuple[Tensor, tuple[Pairs, Terms]]:
        # Outside autocast: logits of a low-precision product would lose the differences that the loss is made of.
        scale = state.teacher.logit_scale if state.teacher is not None else None
        features = _told_apart(features, batch.hard_tokens.shape[1])
        pairs = Pairs(**features, known=known, image_known=image_known, text_known=text_known, teacher_scale=scale)
        with record_function("diptych.loss"):
            terms = state.objective(pairs, moment)
        return terms.total, (pairs, terms)

    def backward(total: Tensor) -> None:
        with record_function("diptych.backward"):
            engine.backward(total)

    if len(parts) == 1:
        total, result = loss(embed(parts[0]))
        backward(total)
        return result
    return accumulate(embed, parts, loss, synchronised=gradient_sync(state.wrapped), backward=backward)


def _parts(batch: Batch, device: torch.device, size: int) -> list[_Inputs]:
    """A batch in pieces of at most `size` rows, on the device."""
    hard = torch.cat([batch.hard_tokens, batch.positive_tokens], 1)  # embedded together, told apart afterwards
    counters = (batch.counters.images, batch.counters.tokens) if batch.counters is not None else (None, None)
    hard_or_none = hard if hard.numel() else None
    texts = (batch.tokens, hard_or_none, batch.second_tokens, batch.teacher_tokens)
    columns = (batch.images, *texts, batch.labels, *counters)
    count = -(-len(batch.images) // size)
    divided = [
        column.to(device, non_blocking=True).split(size) if column is not None else (None,) * count
        for column in columns
    ]
    return [_Inputs(*part) for part in zip(*divided, strict=True)]


def _with_wrong_pairs(
    engine: Engine, state: TrainState, parts: list[_Inputs], caption_ids: Tensor, moment: Moment
) -> list[_Inputs]:
    """Each part with wrong pairs of the whole batch that look right, by a pass that sees what the next one will."""
    with torch.no_grad(), engine.autocast(), RandomState().replayed(), record_function("diptych.partners"):
        found = [state.wrapped(part.images, part.tokens) for part in parts]
    image, text = _joined(found)
    group = state.objective.groups.at(moment.step)
    seed = derive(moment.seed, "partners", moment.step)
    drawn = partners.draw(image, text, found[0].logit_scale, caption_ids, group, seed=seed)
    wrong = partners.wrong_pairs(drawn, torch.cat([part.tokens for part in parts]), group)
    divided = partners.divided(wrong, [len(part.images) for part in parts])
    return [replace(part, wrong=own) for part, own in zip(parts, divided, strict=True)]


def _known(
    engine: Engine, state: TrainState, batch: Batch, parts: list[_Inputs]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What the objective's plugs need of each pair, each picture, each text."""
    needs = state.objective.needs
    known = {"caption_ids": batch.caption_ids.to(engine.device, non_blocking=True)}
    if "labels" in needs:
        known["labels"] = _checked_labels(state.model, batch).to(engine.device, non_blocking=True)
    if batch.counters is not None:
        known["counter_present"] = batch.counters.present.to(engine.device, non_blocking=True)
        known["counter_ids"] = batch.counters.caption_ids.to(engine.device, non_blocking=True)
    if batch.hard_ids.numel():
        known["hard_ids"] = batch.hard_ids.to(engine.device, non_blocking=True)
    if "sample_ids" in needs:
        known["sample_ids"] = batch.sample_ids.to(engine.device, non_blocking=True)
    if "surface_features" in needs:
        known["surface_features"] = torch.cat([surface_features(part.tokens) for part in parts])
    if "teacher_features" not in needs:
        return known, {}, {}
    with torch.no_grad(), engine.autocast(), record_function("diptych.teacher"):
        taught = [_taught(state, part) for part in parts]
    image, text = _joined(taught)
    return known, {"teacher_features": image}, {"teacher_features": text}


def _joined(parts: list[Embeddings]) -> tuple[Tensor, Tensor]:
    """The features of pictures and texts of all parts."""
    return torch.cat([part.image_features for part in parts]), torch.cat([part.text_features for part in parts])


def _checked_labels(model: DualEncoder, batch: Batch) -> Tensor:
    """Raises DataError for a class that the model's prompts do not know."""
    assert batch.labels is not None, "check_needs has seen to it that the data brings them"
    count = len(model.class_prompts.names) if model.class_prompts is not None else None
    if count is not None and (wrong := int(batch.labels.max())) >= count:
        key = batch.keys[int(batch.labels.argmax())]
        raise DataError(
            f"class {wrong} of sample {key!r}, and there are {count} names · model.adapters: classes · name all classes"
        )
    return batch.labels


def _taught(state: TrainState, part: _Inputs) -> Embeddings:
    """What the teacher makes of some rows."""
    if state.teacher is not None:
        assert part.teacher_tokens is not None, "the feed asks for them wherever there is a teacher"
        return state.teacher.embed(part.images, part.teacher_tokens)
    assert state.ema is not None, "check_needs has seen to it that there is a teacher"
    found: Embeddings = state.ema.model(part.images, part.tokens)
    return found
