"""Whether data, model, teacher and objective of a run go together: said before the first step."""

from diptych import names
from diptych.errors import ConfigError
from diptych.losses.objective import Objective
from diptych.models.dual_encoder import DualEncoder
from diptych.models.teacher import Teacher
from diptych.train.recipe import Recipe

_OFFERED = ("caption_ids", "sample_ids", "surface_features", "teacher_features", "labels", "counter_present")


def check(recipe: Recipe, model: DualEncoder, objective: Objective, teacher: Teacher | None) -> None:
    """Raises ConfigError where they do not."""
    check_needs(recipe, objective, teacher)
    _check_captioner(model, objective)
    _check_prompts(model, objective)


def check_needs(recipe: Recipe, objective: Objective, teacher: Teacher | None = None) -> None:
    """Raises ConfigError when the objective needs what training does not have."""
    lacking = [name for name in objective.needs if name not in _OFFERED]
    if objective.config.wants_hard_captions and recipe.data.caption_configs[0].hard is None:
        raise ConfigError(
            "the objective uses hard captions and the data brings none · objective · name their column in "
            "data.captions.hard, or drop the terms that use them"
        )
    if objective.config.wants_positive_captions != (recipe.data.caption_configs[0].positive is not None):
        raise ConfigError(
            "further right captions are brought and used together · data.captions.positive, and positive_captions in "
            "objective.contrastive.candidates · set both, or neither"
        )
    if objective.config.wants_second_captions != bool(recipe.data.caption_configs[0].second_views):
        raise ConfigError(
            "second captions are brought and used together · data.captions.second_views, and `view: second` of the "
            "term caption in objective.regularisers · set both, or neither"
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
            "objective.regularisers or counter_pairs in objective.contrastive.candidates · set both, or neither"
        )
    if "teacher_features" in objective.needs:
        _check_widths(recipe, objective, teacher)
    elif teacher is not None:
        raise ConfigError(
            "nothing in the objective asks the teacher · objective · give it the targets momentum or the regulariser "
            "distillation, or leave `teacher` out"
        )


def _check_captioner(model: DualEncoder, objective: Objective) -> None:
    """Raises ConfigError where the objective asks for captions that the model does not write, or leaves its decoder
    without anything to learn."""
    asked, decoder = objective.config.caption is not None, model.text_decoder
    if asked and decoder is None:
        raise ConfigError(
            "the objective has the term caption, and the model has no decoder · objective.regularisers · name a "
            "captioner, such as coca_ViT-B-32, in model.towers.name, or give model.towers.multimodal, or a language "
            "model prefix_tokens"
        )
    matching = objective.config.wants_matching
    if matching != (model.match_head is not None):
        raise ConfigError(
            "a matching head and what teaches it go together · model.matching, and matching in objective.regularisers "
            "· set both, or neither"
        )
    if decoder is None or asked:
        return
    # The matching head looks at all of a decoder but its vocabulary.
    untaught = "text_decoder.text_projection" if matching else "text_decoder"
    if any(p.requires_grad for name, p in model.named_parameters() if names.begins(name, untaught)):
        raise ConfigError(
            f"nothing in the objective teaches {untaught} · objective.regularisers · add caption, or freeze it with "
            f"model.frozen: [{untaught}]"
        )


def _check_prompts(model: DualEncoder, objective: Objective) -> None:
    """Raises ConfigError where the model has prompts of classes and nothing teaches them, or the other way round."""
    asked = "classification" in {term.choice_name for term in objective.config.regularisers}
    if asked and model.class_prompts is None:
        raise ConfigError(
            "the objective has the term classification, and the model has no prompts of classes · model.adapters · add "
            "context or class_names"
        )
    if model.class_prompts is not None and ("counter_present" in objective.needs or objective.config.wants_matching):
        raise ConfigError(
            "prompts of classes read no captions · objective.regularisers · leave out counter_images and matching"
        )
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
