"""What checks find, and the exit code that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ok, WARN (it works, but badly or not everywhere) or FAIL.
        found: What it is.
        mend: What to do; empty when it is fine.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        findings: One of each check, with `name`, `status` (ok, WARN or FAIL), `found`
            and `mend` (what to do; empty when it is fine).
    """

    findings: list[Finding]

    @property
    def code(self) -> int:
        """The exit code: 1 if anything failed."""
        return int(any(finding.status == "FAIL" for finding in self.findings))

    def __str__(self) -> str:
        lines = []
        for one in self.findings:
            lines.append(f"{one.status:4}  {one.name}: {one.found}")
            lines += [f"      {one.mend}"] if one.mend else []
        failed = sum(one.status == "FAIL" for one in self.findings)
        warned = sum(one.status == "WARN" for one in self.findings)
        counts = f"{len(self.findings)} checks, {failed} failed, {warned} warnings"
        return "\n".join([*lines, counts])
