"""Where the numbers of metrics.jsonl go besides. A third place is one more class, and a line in `trackers`."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.config import to_tree
from diptych.errors import ConfigError, one_line
from diptych.log import Tracker
from diptych.runfolder import RunFolder, write_text
from diptych.train.recipe import LogConfig, Recipe


def check_installed(config: LogConfig) -> None:
    """Raises ConfigError where a tracker's library is missing: before anything that takes long."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is not installed · log.wandb · pip install 'diptych[wandb]', or leave the key out")


def trackers(recipe: Recipe, run: RunFolder, *, resume_step: int) -> list[Tracker]:
    """Those that the recipe asks for. For the first rank alone. Raises ConfigError where one does not start."""
    found: list[Tracker] = []
    if recipe.log.tensorboard:
        found.append(TensorBoard(run.tensorboard, resume_step=resume_step))
    if recipe.log.wandb is not None:
        found.append(WeightsAndBiases(recipe.log.wandb, run, to_tree(recipe)))
    return found


class TensorBoard:
    """Event files."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and not every run wants it

        self._events = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each number."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        """Writes out what is still held."""
        self._events.close()


class WeightsAndBiases:
    """One run at Weights & Biases for one run folder, however often it is resumed: its id lies in the folder."""

    def __init__(self, project: str, run: RunFolder, config: Mapping[str, Any]) -> None:
        """Raises ConfigError where wandb cannot start."""
        import wandb

        if not run.wandb_id.is_file():
            write_text(run.wandb_id, uuid.uuid4().hex + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=run.wandb_id.read_text(encoding="utf-8").strip(),
                name=run.root.name,
                dir=str(run.root.absolute()),
                config=dict(config),
                allow_val_change=True,  # a resumed run may differ in some keys
                resume="allow",
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb does not start ({one_line(error, 200)}) · log.wandb · `wandb login`, set WANDB_MODE=offline, "
                "or leave the key out"
            ) from error
        # A step of its own: wandb's never goes back, and drops what a run writes that has gone back to a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"step": step} | dict(values))

    def close(self, *, failed: bool = False) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=1 if failed else 0)
