"""Commands for those who operate medray: nights, jobs, checks."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from medray.apps.commands.options import (
    Command,
    add_run_options,
    no_options,
    positive,
    run_options,
)
from medray.errors import ConfigError


def _add_nightly(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--inbox", required=True, metavar="URI", help="slides arrive here")
    sub.add_argument("--out", required=True, metavar="URI", help="where nights go")
    sub.add_argument("--truth", metavar="URI", help="dataset, or folder of annotations")
    sub.add_argument("--reference", metavar="DATASET", help="trained on: watch drift")
    sub.add_argument("--webhook", metavar="URL", help="gets the summary as JSON")
    sub.add_argument(
        "--settle", type=float, default=60.0, metavar="S", help="unchanged for (60 s)"
    )
    sub.add_argument(
        "--night",
        metavar="YYYY-MM-DD",
        help="its date (that of the evening: noon to noon, UTC)",
    )
    sub.add_argument(
        "--tries", type=int, default=3, metavar="N", help="nights for a failure (3)"
    )
    add_run_options(sub)


def _nightly(args: argparse.Namespace) -> Any:
    from medray.apps.nightly.night import nightly

    return nightly(
        args.inbox,
        model=args.model,
        out=args.out,
        truth=args.truth,
        reference=args.reference,
        webhook=args.webhook,
        settle=args.settle,
        night=args.night,
        tries=args.tries,
        options=run_options(args),
    )


def _add_submit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "words", nargs="+", metavar="COMMAND", help="what the job does, after --"
    )
    sub.add_argument(
        "--job",
        required=True,
        metavar="ID",
        help="its id; one that is there is followed",
    )
    sub.add_argument("--address", help="http://HOST:8265 (RAY_API_SERVER_ADDRESS)")
    sub.add_argument("--stage", default="", help="shown in Ray's dashboard")
    sub.add_argument(
        "--wait",
        type=positive,
        default=1800.0,
        metavar="S",
        help="seconds that no head may answer (1800)",
    )


def _submit(args: argparse.Namespace) -> Any:
    from medray.apps.submit import submit

    return submit(
        args.words,
        job=args.job,
        address=args.address,
        wait=args.wait,
        stage=args.stage,
    )


def _add_doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", metavar="MODEL", help="look at this one too")
    sub.add_argument("--out", metavar="URI", help="look whether it can be written")
    sub.add_argument("--address", help="of Ray: HOST:PORT or http://HOST:8265")
    sub.add_argument(
        "--kubernetes",
        action="store_true",
        help="look at the cluster of kubectl's context, or of this pod",
    )
    sub.add_argument("--namespace", help="medray's there (medray, or this pod's)")


def _doctor(args: argparse.Namespace) -> Any:
    from medray.apps.doctor.doctor import doctor

    if args.namespace and not args.kubernetes:
        raise ConfigError("--namespace goes with --kubernetes")
    return doctor(
        model=args.model,
        out=args.out,
        address=args.address,
        kubernetes=args.kubernetes,
        namespace=args.namespace,
    )


@dataclasses.dataclass(frozen=True)
class Conformance:
    """Result of the checks; `failed` says what was found, by name."""

    checks: list[Any]
    failed: dict[str, str]

    def __str__(self) -> str:
        counts = f"{len(self.checks)} checks, {len(self.failed)} failed"
        return "\n".join([*map(str, self.checks), counts])


def _conformance(args: argparse.Namespace) -> Any:
    from medray.inference import check_engine, check_medray, medray_engine

    checks = check_engine(medray_engine("crop")) + check_medray()
    return Conformance(checks, {c.name: c.found for c in checks if not c.passed})


COMMANDS = {
    "nightly": Command(
        "what is new in an inbox into masks, a summary", _add_nightly, _nightly
    ),
    "submit": Command(
        "a command to a Ray cluster as a job, and see it through", _add_submit, _submit
    ),
    "doctor": Command(
        "what is wrong with packages, GPUs, Ray, storage", _add_doctor, _doctor
    ),
    "conformance": Command(
        "check that stitching can be trusted here", no_options, _conformance
    ),
}
