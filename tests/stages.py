"""Stages that do nothing, for tests of what is around them."""

from typing import Any

from medray.execution.stage import Stage


def empty_stage(out: str, regions: list[dict[str, Any]]) -> Stage:
    """A stage that plans the same regions for each slide."""
    return Stage(
        name="empty",
        out=out,
        plan=lambda header, slide: ({}, regions),
        read=lambda row: (row, None),
        write=lambda row, layers: {},
        finish=lambda header: {},
        slide_row=lambda header, records: {},
    )
