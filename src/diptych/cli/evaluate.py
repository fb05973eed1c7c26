"""`diptych eval`: what is measured of a model."""

import argparse
from pathlib import Path
from typing import Any

from diptych.cli.arguments import MODEL_HELP, add_overwrite, add_settings, add_verb


def add(verbs: Any) -> None:
    """Declares the verbs."""
    _add_eval(verbs)


def _add_eval(verbs: Any) -> None:
    evaluate = add_verb(
        verbs,
        "eval",
        _eval,
        "measure a model: classification, retrieval, captions, …; writes results.json, for a run also report.html",
        example="diptych eval runs/first --config configs/eval/emoji.yaml",
        keys="diptych_eval.suite:EvalConfig",
    )
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument("--config", type=Path, required=True, help="YAML file of tasks")
    evaluate.add_argument("--out", type=Path, help="folder for results (default: RUN/eval)")
    add_settings(evaluate)
    add_overwrite(evaluate, "results")


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.config import load as load_config
    from diptych.distributed.runtime import joined_ranks
    from diptych.encoder import load
    from diptych.runfolder import RunFolder
    from diptych_eval.suite import EvalConfig, evaluate

    tasks = load_config(EvalConfig, options.config, options.settings)
    run = RunFolder(Path(options.model))
    folder = options.out or (run.evaluation if run.exists else Path("eval") / options.model.replace("/", "_"))
    with joined_ranks() as ranks:
        results = evaluate(load(options.model), tasks, out=folder, overwrite=options.overwrite, ranks=ranks)
    summary: dict[str, Any] = {f"{result.task} {result.dataset}": result.metrics for result in results}
    if run.exists and ranks.is_main:
        from diptych_eval.report.html import write_report

        write_report([run.root])
        summary["report"] = str(run.report)
    return summary
