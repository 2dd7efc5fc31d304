"""Commands that make a dataset, or show what it would be made of."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import (
    SLIDES,
    Command,
    add_executor,
    add_partial_ok,
    add_reading,
    names,
    numbers,
    reading,
)
from medray.errors import ConfigError


def _add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", default="demo", help="folder to work in (demo)")


def _demo(args: argparse.Namespace) -> Any:
    from medray.apps.demo import demo

    return demo(args.out)


def _add_check(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=SLIDES)
    sub.add_argument("--out", metavar="DIR", help="for check.html and slides.csv")
    sub.add_argument("--annotations", metavar="DIR", help="files named like the slides")
    sub.add_argument(
        "--classes",
        type=names,
        default=("background", "tumour"),
        metavar="A,B",
        help="class names by label value, background first (background,tumour)",
    )
    add_reading(sub)


def _check(args: argparse.Namespace) -> Any:
    from medray.apps.check_slides import check

    return check(
        args.slides,
        annotations=args.annotations,
        classes=args.classes,
        **reading(args),
        out=args.out,
    )


def _add_ingest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=SLIDES)
    sub.add_argument("--out", required=True, metavar="DATASET", help="dataset to make")
    sub.add_argument("--annotations", metavar="DIR", help="files named like the slides")
    sub.add_argument(
        "--classes",
        type=names,
        default=(),
        metavar="A,B",
        help="class names by label value, background first (background,tumour; of "
        "class folders their names)",
    )
    add_reading(sub)
    sub.add_argument("--groups", metavar="CSV", help="slide,group: patients")
    sub.add_argument("--splits", metavar="CSV", help="slide,split: train, val or test")
    sub.add_argument(
        "--fractions",
        type=numbers,
        default=(0.7, 0.15, 0.15),
        metavar="T,V,T",
        help="shares of train, val and test (0.7,0.15,0.15)",
    )
    sub.add_argument("--seed", type=int, default=0, help="decides the splits (0)")
    sub.add_argument(
        "--side",
        type=int,
        metavar="PX",
        help="SLIDES is a folder of class folders; side of their images",
    )
    sub.add_argument(
        "--patients",
        default="",
        metavar="REGEX",
        help="finds the patient in the name of an image of class folders",
    )
    sub.add_argument(
        "--contours",
        action="store_true",
        help="measure nucleus and cytoplasm by SIPaKMeD's .dat contours (with --side)",
    )
    add_executor(sub)
    add_partial_ok(sub)


def _ingest(args: argparse.Namespace) -> Any:
    if args.side is not None:
        return _ingest_images(args)
    if args.patients:
        raise ConfigError("--patients goes with --side; slides take --groups CSV")
    if args.contours:
        raise ConfigError("--contours goes with --side; slides take --annotations DIR")
    from medray.datasets import ingest

    return ingest(
        args.slides,
        out=args.out,
        annotations=args.annotations,
        classes=args.classes or ("background", "tumour"),
        **reading(args),
        groups=args.groups,
        splits=args.splits,
        fractions=args.fractions,
        seed=args.seed,
        executor=args.executor,
    )


def _ingest_images(args: argparse.Namespace) -> Any:
    from medray.datasets import ingest_images

    if isinstance(args.mpp, str) or args.scene is not None or args.plane is not None:
        raise ConfigError(
            "--side: expected of images --mpp as a number, without --scene and --plane"
        )

    if len(args.slides) != 1 or args.annotations:
        raise ConfigError(
            "--side: expected one folder of class folders, without --annotations"
        )
    return ingest_images(
        args.slides[0],
        out=args.out,
        side=args.side,
        classes=args.classes,
        patients=args.patients,
        groups=args.groups,
        splits=args.splits,
        fractions=args.fractions,
        seed=args.seed,
        contours=args.contours,
        mpp=args.mpp,
        executor=args.executor,
    )


COMMANDS = {
    "demo": Command(
        "the whole way on generated slides, with a report", _add_demo, _demo
    ),
    "check": Command(
        "slides and annotations as medray understands them", _add_check, _check
    ),
    "ingest": Command("slides and annotations into a dataset", _add_ingest, _ingest),
}
