"""The model of a run folder: its configuration, and the weights of its newest intact checkpoint."""

from dataclasses import replace
from pathlib import Path

from diptych import checkpoint
from diptych.config import from_tree, read_yaml
from diptych.errors import CheckpointError, one_line
from diptych.models import dual_encoder
from diptych.models.adapters.compress import Compress
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.runfolder import RunFolder


def open_run(run: RunFolder) -> DualEncoder:
    """The model with the averaged weights where the run kept them.

    Raises:
        CheckpointError: there is no run, or no intact checkpoint of it.
        ConfigError: its model cannot be built here.
    """
    config = model_config(run)
    # A checkpoint holds compressed weights as the numbers that they stand for.
    config = replace(config, adapters=tuple(a for a in config.adapters if not isinstance(a, Compress)))
    model = dual_encoder.build(config, seed=0)
    try:
        model.load_state_dict(checkpoint.load_weights(run.checkpoints))
    except RuntimeError as error:
        raise CheckpointError(f"weights do not fit config.yaml ({one_line(error, 200)}) · {run.root}") from None
    return model


def model_config(run: RunFolder) -> ModelConfig:
    """What the run's model is built from. Raises CheckpointError where the folder has no such thing."""
    if not Path(run.config).is_file():
        raise CheckpointError(f"not a run, there is no config.yaml · {run.root} · check the path")
    tree = read_yaml(run.config)
    if "model" not in tree:
        raise CheckpointError(f"not the configuration of a run, it has no model · {run.config} · check the path")
    return from_tree(ModelConfig, tree["model"], where=str(run.config))
