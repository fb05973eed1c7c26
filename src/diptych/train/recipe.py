"""The root of a run's configuration: one field per component."""

from dataclasses import dataclass, field
from pathlib import Path

from diptych.config import Config
from diptych.data.sources import DataConfig
from diptych.data.stages import Stage, check_stages
from diptych.distributed.runtime import Precision
from diptych.losses.objective import ObjectiveConfig
from diptych.models.dual_encoder import ModelConfig
from diptych.models.speed import SpeedConfig
from diptych.optim.optimizers import OptimConfig
from diptych.train.guard import GuardConfig


@dataclass(frozen=True)
class CheckpointConfig(Config):
    """When checkpoints are written and how many are kept."""

    every_samples: int | None = None
    """Samples between checkpoints; none: one at the end only."""
    keep_last: int = 2
    """Newest checkpoints kept on disk."""
    keep_every_samples: int | None = None
    """The first checkpoint at or behind each multiple of this stays for good; none: only the newest stay."""
    asynchronous: bool = True
    """Write in a thread while training goes on; the weights are copied first. Off, training waits."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {self.keep_last}")
        for name in ("every_samples", "keep_every_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class LogConfig(Config):
    """What is written while training."""

    every_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl; reading the device's scalars is a synchronisation."""
    geometry_every_steps: int | None = 100
    """The geometry of the batch's features (`diptych.geometry`) is in the first line at or behind each multiple of
    this; none: in no line."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the same numbers (`pip install 'diptych[wandb]'`); none: it is not used."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, not {self.every_steps}")
        if self.geometry_every_steps is not None and self.geometry_every_steps < 1:
            raise ValueError(f"geometry_every_steps must be at least 1, not {self.geometry_every_steps}")
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError("wandb must be the name of a project; leave it out where there is none")


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Evaluation during training."""

    config: Path | None = None
    """YAML of evaluation tasks (as for `diptych eval --config`); none: no evaluation during training."""
    every_samples: int | None = None
    """Samples between evaluations; none: at the end only."""

    def __post_init__(self) -> None:
        if self.every_samples is not None and self.every_samples < 1:
            raise ValueError(f"every_samples must be positive, not {self.every_samples}")


@dataclass(frozen=True)
class Recipe(Config):
    """Everything a training run is made from."""

    data: DataConfig
    """Shards, order, pictures and captions."""
    run: Path = Path("runs/run")
    """Folder of the run; the same command with the same folder resumes it."""
    seed: int = 0
    """The one source of randomness: weights, order, augmentation, caption choice, dropout."""
    total_samples: int = 1_000_000
    """Length of the run in samples seen; the master clock of every schedule."""
    global_batch: int = 256
    """Pairs per optimizer step over all ranks."""
    micro_batch: int | None = None
    """Pairs in one forward pass of one rank; none: all at once. The gradient is exactly that of the whole batch, at the
    price of a second forward pass."""
    unmasked_tail_samples: int = 0
    """The last samples of the run see every patch, where the image tower drops some
    (`model.towers.vision.patch_dropout`)."""
    stages: tuple[Stage, ...] = ()
    """Smaller pictures and shorter captions for the first part of the run, in the order of `until_samples`; behind the
    last stage, and in every evaluation, the model's own sizes hold."""
    precision: Precision = "auto"
    """`bf16` autocast or `fp32`; `auto` is bf16 where the hardware has it."""
    ema_decay: float | None = None
    """Decay per step of an averaged copy of the weights, in (0, 1); none: no copy."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two towers."""
    teacher: ModelConfig | None = None
    """Another model, frozen, with weights that it brings along: its features are the `teacher_features` that losses
    ask for, its logit scale goes with them. It has its own size of pictures (the run's are resized), tokenizer and
    width. None: the averaged model (`ema_decay`) is the teacher. Not in checkpoints: a resumed run builds it again."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """What makes a step faster or smaller."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is minimised."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while training."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation during training."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Updates that are left out, and what a failed run does."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.total_samples < self.global_batch:
            raise ValueError(
                f"total_samples ({self.total_samples}) must hold at least one global_batch ({self.global_batch})"
            )
        if not 0 <= self.unmasked_tail_samples <= self.total_samples:
            raise ValueError(f"unmasked_tail_samples must lie in [0, total_samples], not {self.unmasked_tail_samples}")
        check_stages(self.stages, self.total_samples)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in (0, 1), not {self.ema_decay}")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_samples // self.global_batch

    @property
    def thaws(self) -> bool:
        """Whether some of what learns is frozen in a stage."""
        return any(stage.frozen for stage in self.stages)

    def is_logged(self, step: int) -> bool:
        """Whether optimizer step `step`, from 1, has a line in metrics.jsonl: ranks meet there."""
        return step % self.log.every_steps == 0 or step == self.total_steps

    def has_geometry(self, step: int) -> bool:
        """Whether that line has the geometry of features: a multiple of `log.geometry_every_steps` lies behind the
        line before, and not behind this step."""
        every = self.log.geometry_every_steps
        if every is None or not self.is_logged(step):
            return False
        line_before = (step - 1) // self.log.every_steps * self.log.every_steps
        return step // every > line_before // every


MAY_CHANGE = (
    "run",
    "log",
    "checkpoint",
    "evaluate",
    "guard",
    "precision",
    "speed",
    "data.workers",
    "data.prefetch_batches",
    "data.cache_mib",
    "data.remote",
    "data.max_bad_fraction",
    "data.shards",
    "data.sources.*.shards",
)
"""Keys in which a resumed run may differ from its beginning: they do not change what is learned, or where data lie."""
