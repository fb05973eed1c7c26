"""`diptych fewshot` and `diptych interpolate`: what tuning is compared with, and what lies between a base and it."""

import argparse
from pathlib import Path
from typing import Any

from diptych.cli.arguments import MODEL_HELP, add_overwrite, add_settings, add_verb
from diptych.cli.outcome import Outcome


def add(verbs: Any) -> None:
    """Declares the verbs."""
    fewshot = add_verb(
        verbs,
        "fewshot",
        _fewshot,
        "compare ways of tuning on few pictures of each class, over draws, beside baselines that do not",
        example="diptych fewshot configs/tune/fewshot.yaml root=pets out=runs/pets",
        keys="diptych_eval.protocols.plan:FewShotPlan",
    )
    fewshot.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the comparison")
    add_settings(fewshot)
    between = add_verb(
        verbs,
        "interpolate",
        _interpolate,
        "write the model between a base and what was tuned from it (WiSE-FT)",
        example="diptych interpolate runs/base runs/tuned between --share 0.5",
    )
    between.add_argument("base", metavar="BASE", help=MODEL_HELP)
    between.add_argument("tuned", metavar="TUNED", help="what was tuned from it; LoRA is merged")
    between.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    share = between.add_mutually_exclusive_group()
    share.add_argument("--share", type=float, default=0.5, help="0: the base, 1: the tuned model (default: 0.5)")
    share.add_argument(
        "--choose",
        type=Path,
        metavar="CONFIG",
        help="YAML of evaluation tasks on pictures held out: the share, by tenths, that does best in the mean of their "
        "headline figures",
    )
    between.add_argument("--to", choices=("open_clip", "transformers"), default="open_clip", help="form of the folder")
    add_overwrite(between, "an export")


def _fewshot(options: argparse.Namespace) -> Outcome:
    from dataclasses import asdict

    from diptych.config import load
    from diptych_eval.protocols import fewshot, page
    from diptych_eval.protocols.plan import FewShotPlan

    plan = load(FewShotPlan, options.config, options.settings)
    measured = fewshot.run(plan)
    out = plan.out / "fewshot.html"
    page.write_page(measured, f"Few shots, {Path(plan.root).name}", out)
    tables = page.tables(measured)
    text = "\n\n".join([*(table.markdown() for table in tables), f"page: {out}"])
    return Outcome({"page": str(out), "cells": [asdict(one.cell) | one.figures for one in measured]}, text)


def _interpolate(options: argparse.Namespace) -> dict[str, Any]:
    from importlib import import_module

    from diptych.encoder import load
    from diptych.models.interpolate import interpolate
    from diptych.models.merge import merged

    target = import_module(f"diptych.export.to_{options.to}")
    base, tuned = (merged(load(name, device="cpu").model) for name in (options.base, options.tuned))
    values: dict[str, Any] = {"folder": str(options.out), "share": options.share}
    if options.choose is not None:
        from diptych.config import load as load_config
        from diptych_eval.protocols.between import best, headline_mean, sweep
        from diptych_eval.suite import EvalConfig

        found = sweep(base, tuned, headline_mean(load_config(EvalConfig, options.choose)))
        values["share"] = best(found)
        values["by_share"] = {f"{share:g}": figure for share, figure in found.items()}
    target.export(interpolate(base, tuned, values["share"]), options.out, overwrite=options.overwrite)
    return values
