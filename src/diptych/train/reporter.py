"""Steps become lines of metrics.jsonl, a status for whoever watches, and a summary."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import torch

from diptych import checkpoint
from diptych.data.batch import Cursors
from diptych.data.faults import FaultLog
from diptych.distributed import sharding
from diptych.distributed.collectives import mean_over, raise_together
from diptych.distributed.groups import world_group
from diptych.distributed.runtime import Ranks
from diptych.distributed.wrap import Engine
from diptych.errors import DiptychError, Interrupted
from diptych.log import MetricsLog, read_metrics
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder
from diptych.runfolder import RunFolder, write_text
from diptych.train.meters import Throughput
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState, weights_of, whole_weights
from diptych.train.step import StepResult
from diptych.train.summary import Ending, duration, summarise
from diptych.train.trackers import trackers

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Measures a model during training."""

    def __call__(self, model: DualEncoder, ranks: Ranks) -> dict[str, float]:
        """Named figures, without the leading `eval/`, the same on each of the `ranks`, which all call and may share the
        work."""
        ...


class Reporter:
    """Turns steps into metrics; on ranks other than the first it only keeps time. Leaving its context closes trackers,
    whatever has happened."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        run: RunFolder,
        state: TrainState,
        *,
        evaluator: Evaluator | None,
        num_shards: int,
    ) -> None:
        """Every rank must call. Raises ConfigError, on every rank, where a tracker does not start."""
        self._recipe, self._engine, self._run, self._state = recipe, engine, run, state
        self._evaluator, self._num_shards = evaluator, num_shards
        self._first_step, self._started = state.step, time.perf_counter()
        self._active = engine.ranks.is_main
        self.throughput = Throughput()
        self._status = ""
        problem: DiptychError | None = None
        try:
            found = trackers(recipe, run, resume_step=state.step) if self._active else []
        except DiptychError as error:
            problem = error
        raise_together(problem)
        if self._active:
            self._log = MetricsLog(run.metrics, resume_step=state.step, trackers=found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._log.close(failed=error is not None and not isinstance(error, Interrupted))

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
            self._status = status(values, bad_samples=faults.unusable)
            if not sys.stderr.isatty():
                self._log_line(values["train/samples_per_second"])
        faults.check(self._recipe.data.max_bad_fraction, num_shards=self._num_shards)
        return self._status

    @property
    def due(self) -> bool:
        """Whether this step is one at which ranks meet to log."""
        return self._recipe.is_logged(self._state.step)

    def rewind(self) -> None:
        """Forgets the rows behind the step that the run has gone back to."""
        if self._active:
            self._log.rewind(self._state.step)

    def _log_line(self, samples_per_second: float) -> None:
        """What the bar shows, for those who have none."""
        step, steps = self._state.step, self._recipe.total_steps
        left = duration((steps - step) * self._recipe.global_batch / samples_per_second)
        log.info("step=%d/%d %s · %s left", step, steps, self._status, left)

    def _write_faults(self, faults: FaultLog) -> None:
        if faults.unusable:
            write_text(self._run.faults, json.dumps(faults.to_json(), ensure_ascii=False, indent=1) + "\n")

    def _values(self, result: StepResult) -> dict[str, float]:
        """Means over the ranks (each has the loss of its own rows), in one transfer from the device. Every rank must
        call."""
        scale = sharding.whole(self._state.model.logit_scale).detach().exp().squeeze(0)
        device = {f"train/loss/{name}": value for name, value in result.terms.scalars.items()}
        device |= {"train/grad_norm": result.grad_norm, "train/logit_scale": scale} | result.figures
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

    def evaluate(self) -> None:
        """Measures the averaged weights, or the raw ones: all ranks together, or where no rank has all weights the
        first one with a copy, while the others wait. Every rank must call."""
        if self._evaluator is None:
            return
        model = self._state.ema.model if self._state.ema is not None else self._state.model
        with self.throughput.pausing():
            if not self._engine.divides_parameters:
                self._measure(model, self._engine.ranks)
                return
            whole = self._whole(model)
            with self._engine.first_alone():
                if whole is not None:
                    self._measure(whole, Ranks(0, 1))

    def _measure(self, model: DualEncoder, ranks: Ranks) -> None:
        assert self._evaluator is not None
        was_training = model.training
        figures = self._evaluator(model.eval(), ranks)
        model.train(was_training)
        if self._active:
            self._log.write(self._state.step, {f"eval/{name}": value for name, value in figures.items()})

    def _whole(self, model: DualEncoder) -> DualEncoder | None:
        """A copy on the first rank of what ranks hold apart; None on the others."""
        weights = whole_weights(weights_of(model), keep=self._active)
        if not self._active:
            return None
        copy = dual_encoder.build(self._recipe.model, seed=self._recipe.seed)
        copy.load_state_dict(weights)
        return copy.to(self._engine.device)

    def finish(self) -> None:
        """The summary of a run that has come to its end."""
        if not self._active:
            return
        state = self._state
        epochs, unusable = _epochs(state.cursors), state.faults.summary()
        log.info(
            "finished step=%d samples_seen=%d epochs=%s unusable=%s", state.step, state.samples_seen, epochs, unusable
        )
        if state.faults.unusable:
            log.info("all unusable samples by shard: %s", self._run.faults)
        ending = Ending(
            epochs=epochs,
            steps=state.step - self._first_step,
            seconds=time.perf_counter() - self._started,
            checkpoint=checkpoint.newest(self._run.checkpoints),
        )
        text = summarise(read_metrics(self._run.metrics), self._recipe, ending)
        write_text(self._run.summary, text)
        log.info("%s\n%s", self._run.summary, text.rstrip())


def status(values: Mapping[str, float], *, bad_samples: int) -> str:
    """What matters of a line of metrics, for people."""
    parts = [
        f"loss {values['train/loss/total']:.3f}",
        f"{values['train/samples_per_second']:,.0f} samples/s",
        f"data wait {values['data/wait_share']:.0%}",
    ]
    return " · ".join([*parts, f"bad samples {bad_samples:,}"] if bad_samples else parts)


def _epochs(cursors: Cursors | None) -> str:
    """Finished epochs of this rank's lanes: the least and the most."""
    epochs = [cursor.epoch for cursor in cursors.lanes.values()] if cursors is not None else [0]
    return f"{min(epochs)}-{max(epochs)}"
