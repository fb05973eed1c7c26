"""The errors that a user can cause and mend.

DiptychError
├── ConfigError        a key, value or combination in the configuration
├── DataError          a picture, caption, table, shard or folder
├── CheckpointError    a checkpoint that is missing, damaged or of another model
├── DistributedError   ranks, groups and launchers
├── TrainingError      a run that does not learn any more
└── Interrupted        no error: a signal asked the run to end, and it can go on

Every message is one line: *what is wrong (value) · where (file, key, shard, rank) · what to do*.
`diptych.cli` prints it and exits with code 2 (75 where interrupted); anything else is a bug and keeps its traceback.
"""


def one_line(error: BaseException, most: int | None = 300) -> str:
    """What another library says of an error, as a part of such a message: its first `most`
    characters, or all."""
    return " ".join(str(error).split())[:most]


class DiptychError(Exception):
    """The common base: bad input, described in one line."""


class ConfigError(DiptychError):
    """A configuration that cannot be used."""


class DataError(DiptychError):
    """Input data that cannot be used."""


class CheckpointError(DiptychError):
    """A checkpoint that cannot be written, read or matched."""


class DistributedError(DiptychError):
    """A process group that cannot do what was asked."""


class TrainingError(DiptychError):
    """A run whose updates are no numbers any more."""


class Interrupted(DiptychError):
    """A run that was asked to end, has saved what it has, and goes on when the same command is started again."""
