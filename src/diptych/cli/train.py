"""`diptych train` and `diptych tune`."""

import argparse
from pathlib import Path
from typing import Any

from diptych.cli.arguments import add_overwrite, add_settings, add_verb


def add(verbs: Any) -> None:
    """Declares the verbs."""
    _declare(
        verbs,
        "train",
        "pretrain a dual encoder; the same command again resumes",
        example="diptych train configs/pretrain/emoji.yaml run=runs/first seed=1",
    )
    _declare(
        verbs,
        "tune",
        "tune a trained model: LoRA, prompts, locked or whole towers; the same command again resumes",
        example="diptych tune configs/tune/lora.yaml model.towers.run=runs/first run=runs/tuned",
    )


def _declare(verbs: Any, name: str, help: str, *, example: str) -> None:
    """One loop and one recipe serve both: what differs is where the weights come from and which of them learn."""
    verb = add_verb(verbs, name, _train, help, example=example, keys="diptych.train.recipe:Recipe")
    verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    add_settings(verb)
    add_overwrite(verb, "a run")


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.config import load
    from diptych.distributed.runtime import launched_ranks
    from diptych.runfolder import RunFolder
    from diptych.train.loop import train
    from diptych.train.recipe import Recipe

    recipe = load(Recipe, options.config, options.settings)
    if options.overwrite and launched_ranks().is_main:
        RunFolder(recipe.run).remove()
    run = train(recipe, _evaluator(recipe.evaluate.config))
    return {"run": str(run.root), "samples_seen": recipe.total_steps * recipe.global_batch}


def _evaluator(config: Path | None) -> Any:
    """What the loop calls to measure a model while it trains; it knows nothing of the evaluation package."""
    if config is None:
        return None
    from diptych.config import load
    from diptych.distributed.runtime import Ranks
    from diptych.encoder import ModelEncoder
    from diptych.models.dual_encoder import DualEncoder
    from diptych_eval.suite import EvalConfig, evaluate

    tasks = load(EvalConfig, config)

    def measure(model: DualEncoder, ranks: Ranks) -> dict[str, float]:
        results = evaluate(ModelEncoder(model), tasks, ranks=ranks)
        return {
            f"{found.task}/{found.dataset}/{name}": value for found in results for name, value in found.metrics.items()
        }

    return measure
