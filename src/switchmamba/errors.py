"""Every error that a user can cause, and the exit code of the command line for it.

    SwitchMambaError             1  a run failed
    ├── ConfigError              2  what the user typed or configured (also a ValueError)
    ├── DataError                3  data that cannot be used
    ├── CheckpointError          3  a checkpoint that cannot be used
    └── NonFiniteError           1  NaN or infinity in training, stopped before it reached the weights

A message is one line: the value, the rule it breaks, and what to do.
"""


class SwitchMambaError(Exception):
    """Base of all errors raised for a user's sake; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ConfigError(SwitchMambaError, ValueError):
    """A command, an argument or a configuration that asks for something impossible."""

    exit_code = 2


class DataError(SwitchMambaError):
    """Text, shards or a tokenizer that cannot be used; names path, line and byte where they are known."""

    exit_code = 3


class CheckpointError(SwitchMambaError):
    """A checkpoint that is damaged, foreign or incomplete; names the file at fault."""

    exit_code = 3


class NonFiniteError(SwitchMambaError):
    """NaN or infinity in loss or gradients; raised before the update, naming the first bad layer."""
