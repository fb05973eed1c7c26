"""`diptych bench train`: the training loop as it is, on real shards, against peers in the same run.

Every measurement has a process of its own; implementations alternate, so that a machine's moods meet all of them. All
train the same model on the same shards with the same batch, workers and precision; what a step alone can reach is
measured with one batch that is in memory. Captions are cut to the longest of a batch on our side and padded to the
context length on the peer's, so operations are counted for each as it executes them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diptych.bench import train_peer
from diptych.bench.data_pictures import pattern, write_photos
from diptych.bench.train_peer import Request
from diptych.bench.train_plan import PEER, SAVING, TRACE, Plan
from diptych.bench.train_rows import Report, Row, row, saving
from diptych.bench.train_split import Split
from diptych.config import apply_override, dump, from_tree
from diptych.errors import ConfigError, DiptychError
from diptych.train.recipe import Recipe

_LEAST_SHARDS = 8
_LEAST_SAMPLES = 2048
_TIME_LIMIT_SECONDS = 3600

Progress = Callable[[str], None]


def measure_all(plan: Plan, *, progress: Progress) -> Report:
    """Makes the data, measures, and removes the data.

    Raises:
        ConfigError: the folder, the model or a setting cannot be used.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="diptych-bench-", dir=plan.work) as folder:
            return _measured(plan, Path(folder).resolve(), progress)
    except OSError as error:
        raise ConfigError(f"the data cannot be written ({error}) · bench train --work · name another folder") from error


def as_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    shares = {} if report.saving is None else {"share_at_five_minutes": report.saving.share}
    return asdict(report) | shares


def _measured(plan: Plan, folder: Path, progress: Progress) -> Report:
    request = _prepared(plan, folder, progress)
    progress("looking at the model")
    facts = _of_model(request, plan, folder)
    request = replace(request, precision=facts["precision"], model=facts.pop("model"))
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.names}
    problems: dict[str, str] = {}
    for number in range(plan.rounds):
        for name in plan.names:
            if name in problems:
                continue
            progress(f"round {number + 1} of {plan.rounds}: {name}")
            try:
                answers[name].append(_in_process(replace(request, implementation=name), plan))
            except DiptychError as error:
                problems[name] = str(error)
    rows = [
        Row(name, problem=problems[name]) if name in problems else row(name, answers[name], plan, facts)
        for name in plan.names
    ]
    split, problem = _of_step(request, plan, progress)
    versions = {name: found[0]["versions"] for name, found in answers.items() if found}
    return Report(
        plan.command(), plan.batch, facts, tuple(rows), saving(answers.get(SAVING, []), plan), split, problem, versions
    )


def _prepared(plan: Plan, folder: Path, progress: Progress) -> Request:
    """Shards and recipe in the folder, and the request that everybody's is made from."""
    group = max(plan.workers, 1)
    num_shards = group * -(-_LEAST_SHARDS // group)
    shards = pattern(folder / "shards", num_shards)
    recipe = our_recipe(plan, shards, lanes=num_shards)
    progress("making pictures")
    write_photos(folder / "shards", plan.picture, max(_LEAST_SAMPLES, 2 * plan.batch), shards=num_shards)
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    return Request(
        implementation="facts",
        recipe=str(folder / "recipe.yaml"),
        model="",
        folder=str(folder / "process"),
        shards=recipe.data.shards or "",
        device=plan.device,
        precision="",
        batch=plan.batch,
        workers=recipe.data.workers,
        steps=plan.all_steps,
        every=plan.every,
        save_at=plan.saving_step,
        compile=recipe.speed.compile,
        checkpoint_activations=recipe.speed.checkpoint_activations,
        clip=recipe.optim.grad_clip_norm,
    )


def our_recipe(plan: Plan, shards: str, *, lanes: int) -> Recipe:
    """What `diptych train` would be given.

    Raises:
        ConfigError: a setting is wrong, or contradicts an option.
    """
    towers: dict[str, Any] = {"type": "open_clip", "name": plan.model}
    if plan.patch_dropout is not None:
        towers["vision"] = {"patch_dropout": plan.patch_dropout}
    tree: dict[str, Any] = {
        "total_samples": plan.all_steps * plan.batch,
        "global_batch": plan.batch,
        "precision": plan.precision,
        "speed": {"compile": plan.compile, "checkpoint_activations": plan.checkpoint_activations},
        "model": {"towers": towers},
        "data": {"shards": shards, "lanes": lanes, "workers": plan.workers},
    }
    for setting in plan.settings:
        apply_override(tree, setting)
    recipe = from_tree(Recipe, tree, where="bench train")
    if recipe.global_batch != plan.batch:
        raise ConfigError("the batch is everybody's, not only ours · bench train global_batch · use --batch")
    return recipe


def _of_model(request: Request, plan: Plan, folder: Path) -> dict[str, Any]:
    """What is known before anything is timed, with the file of the model in open_clip's form under `model`."""
    try:
        facts = _in_process(request, plan)
    except DiptychError as error:
        raise ConfigError(str(error)) from error
    config = facts.pop("open_clip_config")
    if config is not None:
        (folder / "diptych-bench.json").write_text(json.dumps(config), encoding="utf-8")
    del facts["versions"]
    return facts | {"model": str(folder / "diptych-bench.json") if config is not None else ""}


def _of_step(request: Request, plan: Plan, progress: Progress) -> tuple[Split | None, str]:
    """Where a step's time goes, or why that is not known."""
    if not plan.split_steps:
        return None, ""
    progress("a profiled run")
    try:
        asked = replace(request, implementation="split", steps=plan.split_steps, every=1)
        found = _in_process(asked, plan, keep=plan.profile)
    except DiptychError as error:
        return None, str(error)
    return Split(**found["split"]), ""


def _in_process(request: Request, plan: Plan, *, keep: Path | None = None) -> dict[str, Any]:
    """The answer of a process of its own, whose folder is removed.

    Args:
        keep: where the trace goes that it leaves.

    Raises:
        DiptychError: it failed; the message says how.
    """
    folder = Path(request.folder)
    folder.mkdir()
    try:
        answer = _answer(request, plan)
        if keep is not None:
            shutil.copyfile(folder / TRACE, keep)
    finally:
        shutil.rmtree(folder)
    return answer


def _answer(request: Request, plan: Plan) -> dict[str, Any]:
    module = [sys.executable, "-m", "diptych.bench.train_ours"]
    # Isolated: nothing of ours must be seen by the peer, its script's folder included.
    command = [str(plan.peer_python), "-I", train_peer.__file__] if request.implementation == PEER else module
    if not request.model and request.implementation.startswith(PEER):
        raise DiptychError("open_clip has no such model")
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(request))],
            capture_output=True,
            text=True,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if plan.device == "cpu" else {}),
            timeout=_TIME_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DiptychError(f"took longer than {_TIME_LIMIT_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = f"died ({done.returncode}), perhaps because memory ran out"
        raise DiptychError(killed if done.returncode < 0 or not lines else " ".join(lines[-1].split())[:200])
    answer = json.loads(done.stdout.splitlines()[-1])
    if "problem" in answer:
        raise DiptychError(answer["problem"])
    return answer
