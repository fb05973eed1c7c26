"""The models that are measured: see `diptych.encoder`."""

from diptych.encoder import ModelEncoder, load, load_run

__all__ = ["ModelEncoder", "load", "load_run"]
