"""One optimizer step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from diptych.data.batch import Batch
from diptych.distributed.collectives import average_gradients
from diptych.distributed.wrap import Engine
from diptych.errors import ConfigError, DataError
from diptych.losses.accumulate import Features, accumulate, gradient_sync
from diptych.losses.batch import Moment, Pairs
from diptych.losses.objective import Objective, Terms
from diptych.losses.plugs.weights.inverse_propensity import surface_features
from diptych.models.dual_encoder import DualEncoder, Embeddings
from diptych.models.patch_dropout import keep_all_patches
from diptych.models.teacher import Teacher
from diptych.optim import optimizers, schedules
from diptych.seeding import derive
from diptych.train import meters
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


_OFFERED = ("caption_ids", "sample_ids", "surface_features", "teacher_features", "labels", "counter_present")


def check_needs(recipe: Recipe, objective: Objective, teacher: Teacher | None = None) -> None:
    """Raises ConfigError when the objective needs what training does not have."""
    lacking = [name for name in objective.needs if name not in _OFFERED]
    if objective.config.wants_hard_captions and recipe.data.caption_configs[0].hard is None:
        raise ConfigError(
            "the objective uses hard captions and the data brings none · objective · name their column in "
            "data.captions.hard, or drop the terms that use them"
        )
    if lacking:
        raise ConfigError(
            f"the stream does not bring {', '.join(lacking)} · objective · choose other plugs, or call "
            "diptych.losses.objective from a loop of your own"
        )
    if "labels" in objective.needs and not recipe.data.labels:
        raise ConfigError("the objective uses classes and the data brings none · data.labels · set it to true")
    if ("counter_present" in objective.needs) != recipe.data.counter_images:
        raise ConfigError(
            "counter-images are brought and used together · data.counter_images, and counter_images in "
            "objective.regularisers · set both, or neither"
        )
    if "teacher_features" in objective.needs:
        _check_widths(recipe, objective, teacher)
    elif teacher is not None:
        raise ConfigError(
            "nothing in the objective asks the teacher · objective · give it the targets momentum or the regulariser "
            "distillation, or leave `teacher` out"
        )


def check_captioner(model: DualEncoder, objective: Objective) -> None:
    """Raises ConfigError where the objective asks for captions that the model does not write, or leaves its decoder
    without anything to learn."""
    asked, decoder = objective.config.caption is not None, model.text_decoder
    if asked and decoder is None:
        raise ConfigError(
            "the objective has the term caption, and the model has no decoder · objective.regularisers · name a "
            "captioner, such as coca_ViT-B-32, in model.towers.name, or give model.towers.multimodal"
        )
    if decoder is not None and not asked and any(parameter.requires_grad for parameter in decoder.parameters()):
        raise ConfigError(
            "nothing in the objective teaches the model's decoder · objective.regularisers · add caption, or freeze it "
            "with model.frozen: [text_decoder]"
        )


def check_prompts(model: DualEncoder, objective: Objective) -> None:
    """Raises ConfigError where the model has prompts of classes and nothing teaches them, or the other way round."""
    asked = "classification" in {term.choice_name for term in objective.config.regularisers}
    if asked and model.class_prompts is None:
        raise ConfigError(
            "the objective has the term classification, and the model has no prompts of classes · model.adapters · add "
            "context or class_names"
        )
    if model.class_prompts is not None and "counter_present" in objective.needs:
        raise ConfigError("prompts of classes read no captions · objective.regularisers: counter_images · leave it out")
    if model.class_prompts is not None and not asked:
        raise ConfigError(
            "nothing in the objective teaches the prompts of classes · objective.regularisers · add classification"
        )


def _check_widths(recipe: Recipe, objective: Objective, teacher: Teacher | None) -> None:
    """Raises ConfigError unless there is a teacher, and as wide as plugs want it."""
    if teacher is None and recipe.ema_decay is None:
        raise ConfigError(
            "teacher_features are those of the averaged model, or of another · objective · set ema_decay, such as "
            "0.995, or name a `teacher`"
        )
    width = teacher.model.embed_dim if teacher is not None else objective.embed_dim
    for name, asked in objective.teacher_widths.items():
        if asked != width:
            raise ConfigError(
                f"the teacher's features have {width} numbers, {name} compares them with {asked} · objective · "
                f"distillation and interactive take `teacher_dim: {width}`, targets momentum any width"
            )


@dataclass(frozen=True)
class _Inputs:
    """Pictures and tokens of some rows, on the device."""

    images: Tensor
    tokens: Tensor
    hard_tokens: Tensor | None
    teacher_tokens: Tensor | None
    labels: Tensor | None
    counter_images: Tensor | None
    counter_tokens: Tensor | None

    def with_counters(self) -> tuple[Tensor, Tensor]:
        """Pictures and tokens, those of counter-images behind all others: one pass for both."""
        if self.counter_images is None or self.counter_tokens is None:
            return self.images, self.tokens
        return torch.cat([self.images, self.counter_images]), torch.cat([self.tokens, self.counter_tokens])


def _apart(found: Embeddings, count: int) -> dict[str, Any]:
    """The first `count` rows as what they are, the rest as counter-images."""
    features = found._asdict()
    for name in ("caption_losses", "caption_lengths"):
        features[name] = features[name][:count] if features[name] is not None else None
    counters = {"counter_images": found.image_features[count:], "counter_texts": found.text_features[count:]}
    own = {"image_features": found.image_features[:count], "text_features": found.text_features[:count]}
    return features | own | counters


def _gradients(recipe: Recipe, engine: Engine, state: TrainState, batch: Batch, moment: Moment) -> tuple[Pairs, Terms]:
    """The loss of this rank's rows, and gradients in the parameters."""
    device = engine.device
    parts = _parts(batch, device, recipe.micro_batch or len(batch.images))
    known, image_known, text_known = _known(engine, state, batch, parts)

    def embed(inputs: _Inputs) -> Features:
        with engine.autocast(), record_function("diptych.forward"):
            asked = state.objective.config.caption
            images, tokens = inputs.with_counters()
            found = state.wrapped(images, tokens, inputs.hard_tokens, asked, inputs.labels)
            return found._asdict() if images is inputs.images else _apart(found, len(inputs.images))

    def loss(features: Any) -> tuple[Tensor, tuple[Pairs, Terms]]:
        # Outside autocast: logits of a low-precision product would lose the differences that the loss is made of.
        scale = state.teacher.logit_scale if state.teacher is not None else None
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
    hard = batch.hard_tokens if batch.hard_tokens.numel() else None
    counters = (batch.counters.images, batch.counters.tokens) if batch.counters is not None else (None, None)
    columns = (batch.images, batch.tokens, hard, batch.teacher_tokens, batch.labels, *counters)
    count = -(-len(batch.images) // size)
    divided = [
        column.to(device, non_blocking=True).split(size) if column is not None else (None,) * count
        for column in columns
    ]
    return [_Inputs(*part) for part in zip(*divided, strict=True)]


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
    if "sample_ids" in needs:
        known["sample_ids"] = batch.sample_ids.to(engine.device, non_blocking=True)
    if "surface_features" in needs:
        known["surface_features"] = torch.cat([surface_features(part.tokens) for part in parts])
    if "teacher_features" not in needs:
        return known, {}, {}
    with torch.no_grad(), engine.autocast(), record_function("diptych.teacher"):
        taught = [_taught(state, part) for part in parts]
    image, text = (torch.cat([getattr(t, f"{m}_features") for t in taught]) for m in ("image", "text"))
    return known, {"teacher_features": image}, {"teacher_features": text}


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
