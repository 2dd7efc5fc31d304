"""The commands of `medray`: the options of each, and the one function that it calls."""

from medray.apps.commands import (
    data,
    evaluation,
    inference,
    models,
    operation,
    runs,
    training,
)
from medray.apps.commands.options import Command

COMMANDS: dict[str, Command] = (
    data.COMMANDS
    | training.COMMANDS
    | inference.COMMANDS
    | evaluation.COMMANDS
    | runs.COMMANDS
    | models.COMMANDS
    | operation.COMMANDS
)
"""By name, in the order of `medray --help`."""
