"""What can go wrong, grouped by what the caller does about it."""


class MedrayError(Exception):
    """Base of every error that medray raises on purpose."""


class ConfigError(MedrayError, ValueError):
    """The request is wrong: mend it and run again. Nothing has been done yet."""


class SlideError(MedrayError):
    """One slide or its annotation cannot be used: record it, go on with the others."""


class StoreError(MedrayError):
    """Storage failed for a reason that may pass: try again."""


class FormatError(MedrayError):
    """A store, model or dataset is not what it says it is: stop."""
