"""The training loop: builds, resumes, steps, logs, saves. What happens in a run is the text of this file."""

import copy
import json
import logging
import sys
from contextlib import closing
from typing import NoReturn, Protocol

import torch
from torch.profiler import record_function

from diptych import log as logs
from diptych import runfolder
from diptych.data.batch import Cursors
from diptych.data.faults import FaultLog
from diptych.data.loader import Loader, build_loader
from diptych.data.reader import Feed
from diptych.distributed import sharding
from diptych.distributed.collectives import gather_objects, mean_over, raise_together
from diptych.distributed.groups import world_group
from diptych.distributed.runtime import Ranks, resolve_precision
from diptych.distributed.wrap import Engine
from diptych.errors import ConfigError, DiptychError, Interrupted, TrainingError
from diptych.losses import objective
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import DualEncoder
from diptych.models.ema import Ema
from diptych.optim import optimizers
from diptych.runfolder import RunFolder, write_text
from diptych.train import stages, step
from diptych.train.guard import Guard, listening
from diptych.train.meters import Throughput
from diptych.train.recipe import MAY_CHANGE, Recipe
from diptych.train.saver import Saver
from diptych.train.state import TrainState, restore_newest, weights_of, whole_weights
from diptych.train.step import StepResult

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Measures a model during training."""

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """Named figures, without the leading `eval/`."""
        ...


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
    if engine.way not in ("single", "ddp") and recipe.optim.algorithm == "muon":
        raise ConfigError("Muon needs whole matrices, not slices · optim.algorithm · use adamw, or plain DDP")
    run = _open_run(recipe, engine)
    model = dual_encoder.build(recipe.model, seed=recipe.seed)
    stages.prepare(model, recipe.stages)
    loader = build_loader(recipe.data, feed_of(recipe, model, engine.ranks))
    _check_shards_agree(loader)
    model.to(engine.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs know it for tensors only
    loss = objective.build(recipe.objective, embed_dim=model.embed_dim, seed=recipe.seed).to(engine.device)
    step.check_needs(recipe, loss)
    ema = Ema(model, decay=recipe.ema_decay) if recipe.ema_decay is not None else None
    speed.prepare(model, recipe.speed)
    engine.shard(model, *([ema.model] if ema is not None else []))
    local_batch = recipe.global_batch // engine.ranks.world_size
    wrapped, optimizer = engine.wrap(model, optimizers.build(recipe.optim, model, loss), local_batch=local_batch)
    state = TrainState(model, wrapped, loss, optimizer, ema, Guard(recipe.guard, engine.device))
    if restore_newest(run.checkpoints, state):
        log.info("resumed step=%d samples_seen=%d run=%s", state.step, state.samples_seen, run.root)
    _run_steps(recipe, engine, run, state, loader, evaluator)
    return run


def feed_of(recipe: Recipe, model: DualEncoder, ranks: Ranks) -> Feed:
    """What the run asks of its data on this rank."""
    return Feed(
        global_batch=recipe.global_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=recipe.seed,
        image_size=model.image_size,
        tokenizer=model.tokenizer,
        stages=recipe.stages,
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
    recipe: Recipe, engine: Engine, run: RunFolder, state: TrainState, loader: Loader, evaluator: Evaluator | None
) -> None:
    state.wrapped.train()
    num_shards = sum(len(source.shards) for source in loader.sources)
    reporter = _Reporter(recipe, engine, run, state, num_shards=num_shards)
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
            result = step.run(recipe, engine, state, batch)
            status = reporter.after_step(result)
            bar.advance(status=status)
            if _due(recipe.evaluate.every_samples, before, state.samples_seen):
                reporter.evaluate(evaluator)
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
        reporter.evaluate(evaluator)
    reporter.close()


def _end_early(recipe: Recipe, run: RunFolder, state: TrainState, saver: Saver, signal: str) -> NoReturn:
    """Saves, and raises Interrupted. Every rank must call."""
    if saver.saved_step != state.step:
        saver.save()
    saver.finish()
    raise Interrupted(
        f"{signal} after step {state.step} of {recipe.total_steps} · {run.root} · saved; the same command goes on"
    )


def _go_back(recipe: Recipe, run: RunFolder, state: TrainState, reporter: "_Reporter") -> None:
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


class _Reporter:
    """Turns steps into metrics; on ranks other than the first it only keeps time."""

    def __init__(self, recipe: Recipe, engine: Engine, run: RunFolder, state: TrainState, *, num_shards: int) -> None:
        self._recipe, self._engine, self._run, self._state = recipe, engine, run, state
        self._num_shards = num_shards
        self._active = active = engine.ranks.is_main
        self.throughput = Throughput()
        self._status = ""
        if active:
            tensorboard = run.tensorboard if recipe.log.tensorboard else None
            self._log = logs.MetricsLog(run.metrics, resume_step=state.step, tensorboard=tensorboard)

    def after_step(self, result: StepResult) -> str:
        """Logs when due; returns the text beside the progress bar.

        Raises:
            DataError: too many samples are unusable, on all ranks together; every rank raises it.
        """
        self.throughput.count(self._recipe.global_batch)
        if not self.due:
            return self._status
        faults = self._state.collect_faults()
        values = self._values(result) | self.throughput.read()
        if self._active:
            self._write_faults(faults)
            self._log.write(self._state.step, values)
            loss, rate = values["train/loss/total"], values["train/samples_per_second"]
            self._status = f"loss {loss:.3f} · {rate:,.0f} samples/s"
            if not sys.stderr.isatty():
                log.info("step=%d/%d %s", self._state.step, self._recipe.total_steps, self._status)
        faults.check(self._recipe.data.max_bad_fraction, num_shards=self._num_shards)
        return self._status

    @property
    def due(self) -> bool:
        """Whether this step is one at which ranks meet to log."""
        return self._state.step % self._recipe.log.every_steps == 0 or self._state.step == self._recipe.total_steps

    def rewind(self) -> None:
        """Forgets the rows behind the step that the run has gone back to."""
        if self._active:
            self._log.rewind(self._state.step)

    def _write_faults(self, faults: FaultLog) -> None:
        if faults.unusable:
            write_text(self._run.faults, json.dumps(faults.to_json(), ensure_ascii=False, indent=1) + "\n")

    def _values(self, result: StepResult) -> dict[str, float]:
        """Means over the ranks (each has the loss of its own rows), in one transfer from the device. Every rank must
        call."""
        scale = sharding.whole(self._state.model.logit_scale).detach().exp().squeeze(0)
        device = {f"train/loss/{name}": value for name, value in result.terms.scalars.items()}
        device |= {"train/grad_norm": result.grad_norm, "train/logit_scale": scale}
        numbers = mean_over(torch.stack([value.detach().float() for value in device.values()]), world_group()).tolist()
        counters = {"train/lr": result.lr, "train/samples_seen": float(self._state.samples_seen)}
        counters |= {f"data/bad/{reason}": float(count) for reason, count in self._state.faults.by_reason.items()}
        if skipped := self._state.guard.skipped():
            counters |= {
                "train/skipped_updates": float(skipped),
                "train/roll_backs": float(self._state.guard.roll_backs),
            }
        drawn = self._state.cursors.drawn if self._state.cursors is not None else {}
        counters |= {f"data/samples/{name}": float(count) for name, count in drawn.items() if name}
        return dict(zip(device, numbers, strict=True)) | counters

    def evaluate(self, evaluator: Evaluator | None) -> None:
        """Measures the averaged weights, or the raw ones, on the first rank while the others wait."""
        if evaluator is None:
            return
        model = self._state.ema.model if self._state.ema is not None else self._state.model
        undivided = self._undivided(model)
        with self._engine.first_alone():
            if undivided is not None:
                was_training = undivided.training
                figures = evaluator(undivided.eval())
                undivided.train(was_training)
                self._log.write(self._state.step, {f"eval/{name}": value for name, value in figures.items()})

    def _undivided(self, model: DualEncoder) -> DualEncoder | None:
        """What one rank can measure alone: the model, or where it is divided a copy; None on the other ranks."""
        if not self._engine.divides_parameters:
            return model if self._active else None
        weights = whole_weights(weights_of(model), keep=self._active)
        if not self._active:
            return None
        copy = dual_encoder.build(self._recipe.model, seed=self._recipe.seed)
        copy.load_state_dict(weights)
        return copy.to(self._engine.device)

    def close(self) -> None:
        """The summary at the end."""
        if self._active:
            self._log.close()
            state = self._state
            log.info(
                "finished step=%d samples_seen=%d epochs=%s unusable=%s",
                state.step,
                state.samples_seen,
                _epochs(state.cursors),
                state.faults.summary(),
            )
            if state.faults.unusable:
                log.info("all unusable samples by shard: %s", self._run.faults)


def _epochs(cursors: Cursors | None) -> str:
    """Finished epochs of this rank's lanes: the least and the most."""
    epochs = [cursor.epoch for cursor in cursors.lanes.values()] if cursors is not None else [0]
    return f"{min(epochs)}-{max(epochs)}"
