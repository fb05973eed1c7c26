"""The training loop: builds, resumes, steps, logs, saves. What happens in a run is the text of this file."""

import copy
import logging
from contextlib import closing
from typing import NoReturn

import torch
from torch.profiler import record_function

from diptych import log as logs
from diptych import runfolder
from diptych.data.loader import Loader, build_loader
from diptych.data.reader import Feed
from diptych.distributed.collectives import gather_objects, raise_together
from diptych.distributed.runtime import Ranks, resolve_precision
from diptych.distributed.wrap import Engine
from diptych.errors import ConfigError, DiptychError, Interrupted, TrainingError
from diptych.losses import objective
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import DualEncoder
from diptych.models.ema import Ema
from diptych.models.teacher import Teacher, build_teacher
from diptych.optim import optimizers
from diptych.runfolder import RunFolder
from diptych.train import checks, stages, step
from diptych.train.guard import Guard, listening
from diptych.train.recipe import MAY_CHANGE, Recipe
from diptych.train.reporter import Evaluator, Reporter
from diptych.train.saver import Saver
from diptych.train.state import TrainState, restore_newest
from diptych.train.trackers import check_installed

log = logging.getLogger(__name__)


def train(recipe: Recipe, evaluator: Evaluator | None = None) -> RunFolder:
    """Runs the recipe to its end, from its newest checkpoint if there is one. Every launched rank must call.

    Returns:
        The folder of the finished run.

    Raises:
        DiptychError: the data, the folder or a checkpoint cannot be used; the message says which and what to do.
    """
    with Engine(resolve_precision(recipe.precision)) as engine:
        return _train(recipe, engine, evaluator)


def _train(recipe: Recipe, engine: Engine, evaluator: Evaluator | None) -> RunFolder:
    log.info("ranks=%d way=%s device=%s", engine.ranks.world_size, engine.way, engine.device)
    _check_way(recipe, engine)
    check_installed(recipe.log)
    run = _open_run(recipe, engine)
    model = dual_encoder.build(recipe.model, seed=recipe.seed)
    log.info("parameters=%d trained=%d", *dual_encoder.count(model))
    stages.prepare(model, recipe.stages)
    teacher = build_teacher(recipe.teacher) if recipe.teacher is not None else None
    loader = build_loader(recipe.data, feed_of(recipe, model, engine.ranks, teacher))
    _check_shards_agree(loader)
    model.to(engine.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs know it for tensors only
    loss = objective.build(recipe.objective, embed_dim=model.embed_dim, seed=recipe.seed).to(engine.device)
    checks.check(recipe, model, loss, teacher)
    ema = Ema(model, decay=recipe.ema_decay) if recipe.ema_decay is not None else None
    speed.prepare(model, recipe.speed)
    engine.shard(model, *_untrained(engine, ema, teacher))
    local_batch = recipe.global_batch // engine.ranks.world_size
    optimizer = optimizers.build(recipe.optim, model, loss)
    wrapped, divided = engine.wrap(model, optimizer, local_batch=local_batch, thaws=recipe.thaws)
    state = TrainState(model, wrapped, loss, divided, ema, Guard(recipe.guard, engine.device), teacher)
    if restore_newest(run.checkpoints, state):
        log.info("resumed step=%d samples_seen=%d run=%s", state.step, state.samples_seen, run.root)
    num_shards = sum(len(source.shards) for source in loader.sources)
    with Reporter(recipe, engine, run, state, evaluator=evaluator, num_shards=num_shards) as reporter:
        _run_steps(recipe, engine, run, state, loader, reporter)
    return run


def _check_way(recipe: Recipe, engine: Engine) -> None:
    """Raises ConfigError where a run cannot be divided as the launcher asks."""
    if engine.way not in ("single", "ddp") and recipe.optim.algorithm == "muon":
        raise ConfigError("Muon needs whole matrices, not slices · optim.algorithm · use adamw, or plain DDP")
    if engine.way != "single" and any(adapter.choice_name == "compress" for adapter in recipe.model.adapters):
        raise ConfigError(
            "compressed weights cannot be shared among ranks · model.adapters: compress · use one process"
        )
    if engine.way not in ("single", "ddp") and recipe.thaws:
        raise ConfigError("slices learn all the time · stages: frozen · use one process, or plain DDP")


def _untrained(engine: Engine, ema: Ema[DualEncoder] | None, teacher: Teacher | None) -> list[DualEncoder]:
    """The models beside the one that learns, on the device."""
    models = [ema.model] if ema is not None else []
    if teacher is not None:
        models.append(teacher.model.to(engine.device).to(memory_format=torch.channels_last))  # type: ignore[call-overload]  # see `train`
    return models


def feed_of(recipe: Recipe, model: DualEncoder, ranks: Ranks, teacher: Teacher | None = None) -> Feed:
    """What the run asks of its data on this rank."""
    return Feed(
        global_batch=recipe.global_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=recipe.seed,
        image_size=model.image_size,
        tokenizer=model.tokenizer,
        stages=recipe.stages,
        teacher_tokenizer=teacher.model.tokenizer if teacher is not None else None,
        text_multiple=recipe.speed.chosen_text_multiple(),
    )


def _open_run(recipe: Recipe, engine: Engine) -> RunFolder:
    """Rank 0 prepares the folder; when that fails, every rank fails with the same message."""
    problem: DiptychError | None = None
    if engine.ranks.is_main:
        try:
            runfolder.prepare(recipe.run, recipe, may_change=MAY_CHANGE)
        except DiptychError as error:
            problem = error
    raise_together(problem)
    return RunFolder(recipe.run)


def _check_shards_agree(loader: Loader) -> None:
    """Raises ConfigError on every rank where one lists other shards: the order is that of the list. Every rank must
    call."""
    lists = gather_objects({source.name: source.digest for source in loader.sources})
    for rank, theirs in enumerate(lists):
        if theirs != lists[0]:
            raise ConfigError(
                f"rank {rank} finds other shards than rank 0 ({theirs} there, {lists[0]} here) · data.shards · is the "
                "folder the same on every node?"
            )


def _run_steps(
    recipe: Recipe, engine: Engine, run: RunFolder, state: TrainState, loader: Loader, reporter: Reporter
) -> None:
    state.wrapped.train()
    thaw = stages.Thaw(state.model, recipe.stages)
    bar_text = f"training {run.root.name}"
    first_step, before = state.step, state.samples_seen
    with (
        listening() as request,
        closing(Saver(recipe, engine, run, state)) as saver,
        loader.batches(state.cursors) as batches,
        logs.progress(bar_text, recipe.total_steps, quiet=not engine.ranks.is_main, done=state.step) as bar,
    ):
        while state.step < recipe.total_steps:
            before = state.samples_seen
            with reporter.throughput.waiting(), record_function("diptych.data_wait"):
                batch = next(batches)
            thaw.at(batch.cursors.slot - recipe.global_batch)
            result = step.run(recipe, engine, state, batch)
            status = reporter.after_step(result)
            bar.advance(status=status)
            if _due(recipe.evaluate.every_samples, before, state.samples_seen):
                reporter.evaluate()
            if _due(recipe.checkpoint.every_samples, before, state.samples_seen):
                saver.save()
            # Ranks agree on it where they meet anyway.
            agreed = reporter.due or engine.ranks.world_size == 1
            if agreed and (signal := next(filter(None, gather_objects(request.name)), "")):
                _end_early(recipe, run, state, saver, signal)
            if reporter.due and state.guard.failed:
                saver.finish()
                _go_back(recipe, run, state, reporter)
        if saver.saved_step != state.step:
            saver.save()
        saver.finish()
    if state.step > first_step and not _due(recipe.evaluate.every_samples, before, state.samples_seen):
        reporter.evaluate()
    reporter.finish()


def _end_early(recipe: Recipe, run: RunFolder, state: TrainState, saver: Saver, signal: str) -> NoReturn:
    """Saves, and raises Interrupted. Every rank must call."""
    if saver.saved_step != state.step:
        saver.save()
    saver.finish()
    raise Interrupted(
        f"{signal} after step {state.step} of {recipe.total_steps} · {run.root} · saved; the same command goes on"
    )


def _go_back(recipe: Recipe, run: RunFolder, state: TrainState, reporter: Reporter) -> None:
    """Takes up the newest checkpoint again, and leaves out the samples that came since. Every rank must call.

    Raises:
        TrainingError: the recipe does not want that, there is no checkpoint, or it has been done too often.
    """
    why = f"the last {recipe.guard.max_skipped} updates or more were no numbers or spikes, at step {state.step}"
    if recipe.guard.on_failure == "stop" or state.guard.roll_backs >= recipe.guard.max_roll_backs:
        raise TrainingError(
            f"{why} · {run.root} · lower optim.peak_lr, set guard.spike_factor or guard.on_failure=roll_back; the same "
            "command goes on from the newest checkpoint"
        )
    cursors, faults, guard = state.cursors, state.faults, copy.copy(state.guard)
    if not restore_newest(run.checkpoints, state):
        raise TrainingError(
            f"{why}, and there is no checkpoint to go back to · {run.root} · set checkpoint.every_samples"
        )
    state.cursors, state.faults = cursors, faults
    state.guard.went_back(guard)
    reporter.rewind()
    log.warning("%s: back to step %d, on with the samples that follow now", why, state.step)


def _due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` samples was passed by the last step."""
    return every is not None and now // every > before // every
