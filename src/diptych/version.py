"""The version, read by the build and by `diptych --version`."""

__version__ = "0.1.0"
