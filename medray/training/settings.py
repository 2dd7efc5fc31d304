"""How pydantic checks the dataclasses of a recipe."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown keys are errors, and so are numbers that are infinite or not a number."""
