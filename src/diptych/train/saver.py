"""When the ranks of a run make a checkpoint together, and how they learn that it failed."""

from functools import partial

from diptych import checkpoint
from diptych.distributed.collectives import raise_together
from diptych.distributed.wrap import Engine
from diptych.errors import DiptychError
from diptych.runfolder import RunFolder
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState


class Saver:
    """Checkpoints of a run, written by the first rank."""

    def __init__(self, recipe: Recipe, engine: Engine, run: RunFolder, state: TrainState) -> None:
        self._config, self._folder, self._state = recipe.checkpoint, run.checkpoints, state
        self._writer = checkpoint.Writer() if engine.ranks.is_main else None
        self.saved_step = state.step

    def save(self) -> None:
        """Begins to write what the run is now; waits for the one before. Every rank must call.

        Raises:
            CheckpointError: the one before, or where nothing is asynchronous this one, cannot be written.
        """
        self.finish()
        snapshot = self._state.snapshot()
        self.saved_step = self._state.step
        if self._writer is not None:
            self._writer.begin(
                partial(
                    checkpoint.save,
                    self._folder,
                    self._state.step,
                    snapshot,
                    keep_last=self._config.keep_last,
                    keep_every_samples=self._config.keep_every_samples,
                )
            )
        if not self._config.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Waits for what is being written. Every rank must call, and raises when it failed."""
        problem: DiptychError | None = None
        try:
            if self._writer is not None:
                self._writer.finish()
        except DiptychError as error:
            problem = error
        raise_together(problem)

    def close(self) -> None:
        """Waits, whatever comes of it."""
        if self._writer is not None:
            self._writer.close()
