"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

SLIDES = "slide files, globs, folders, s3:// or gs:// addresses, or a dataset"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `medray`.

    Attributes:
        text: What it does, for --help.
        add: Adds its options.
        run: Calls the function that does it, and returns that function's result.
    """

    text: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Any]


def no_options(_: argparse.ArgumentParser) -> None:
    """Add nothing."""


def add_partial_ok(sub: argparse.ArgumentParser) -> None:
    """Add --partial-ok, for schedulers that restart what fails."""
    sub.add_argument(
        "--partial-ok",
        action="store_true",
        help="exit with 0, not 3, if some slides failed",
    )


def add_executor(sub: argparse.ArgumentParser) -> None:
    """Add --executor, for debugging a stage without a cluster."""
    sub.add_argument(
        "--executor",
        choices=("ray", "local"),
        default="ray",
        metavar="WHERE",
        help="ray, or local: in this process, one thing after the other (ray)",
    )


def add_run_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of a run, which infer, plan and nightly share."""

    def choice(name: str, values: tuple[str, ...], text: str) -> None:
        text = f"{', '.join(values)}: {text}"
        sub.add_argument(
            name, choices=values, default=values[0], metavar="HOW", help=text
        )

    def flag(name: str, text: str) -> None:
        sub.add_argument(name, action="store_true", help=text)

    sub.add_argument(
        "--model",
        required=True,
        nargs="+",
        metavar="MODEL",
        help="from train; several: ensemble",
    )
    add_reading(sub)
    add_precision(sub)
    choice("--stitch", ("crop", "blend"), "windows' middles, or their mean")
    choice("--tta", ("none", "flips", "all"), "mirrored, turned windows too")
    flag("--vote", "of several models the commonest class, not the mean")
    sub.add_argument(
        "--thresholds",
        type=numbers,
        default=(),
        metavar="P,P",
        help="least probability by class, background first",
    )
    sub.add_argument(
        "--crf", type=int, default=0, metavar="N", help="boundary refinement rounds (0)"
    )
    flag("--probabilities", "store them too")
    flag("--quality", "store uncertainty, disagreement, unreadable too")
    flag("--outlines", "write GeoJSON for QuPath too")
    sub.add_argument(
        "--smooth", type=int, default=0, metavar="R", help="radius of smoothing, px (0)"
    )
    sub.add_argument(
        "--holes", type=int, default=0, metavar="N", help="fill holes below N px (0)"
    )
    sub.add_argument(
        "--smallest", type=int, default=0, metavar="N", help="drop objects below N px"
    )
    flag("--everywhere", "predict glass as well")
    sub.add_argument("--within", metavar="DIR", help="only inside these annotations")
    sub.add_argument(
        "--coarse", type=int, default=1, metavar="K", help="look first K times coarser"
    )
    sub.add_argument("--region", type=int, default=0, help="side in pixels (0: fits)")
    sub.add_argument(
        "--timeout",
        type=positive,
        default=300.0,
        metavar="S",
        help="a region's reading may take (300 s)",
    )


def run_options(args: argparse.Namespace) -> Any:
    """Return the `Options` of a run from the options of `add_run_options`."""
    from medray.inference import Cleaning, Options
    from medray.models import Prediction

    def chosen(cls: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        return {key: value for key, value in vars(args).items() if key in names}

    prediction = Prediction(**chosen(Prediction))
    clean = Cleaning(**chosen(Cleaning))
    return Options(**chosen(Options), prediction=prediction, clean=clean)


def add_precision(sub: argparse.ArgumentParser) -> None:
    """Add --precision."""
    sub.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        metavar="P",
        help="auto, float32, bfloat16 or float16 (auto)",
    )


def add_reading(sub: argparse.ArgumentParser) -> None:
    """Add the options that override what slides say of themselves."""
    sub.add_argument(
        "--mpp",
        type=_mpp,
        metavar="UM|CSV",
        help="um per pixel, over the files'; of some: a CSV (slide,mpp)",
    )
    sub.add_argument(
        "--scene",
        type=int,
        metavar="N",
        help="of several slides in a file (0 is first)",
    )
    sub.add_argument(
        "--plane", type=int, metavar="N", help="of several focal planes (0 is first)"
    )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options of `add_reading`."""
    return {"mpp": args.mpp, "scene": args.scene, "plane": args.plane}


def key_values(text: str) -> tuple[str, list[Any]]:
    """Parse `key=[A,B]`."""
    import yaml

    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(values) if equals else None
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{text}: {problem}") from error
    if not isinstance(found, list):
        raise argparse.ArgumentTypeError(f"expected key=[A,B], found {text}")
    return key, found


def names(text: str) -> tuple[str, ...]:
    """Parse names between commas."""
    return tuple(name.strip() for name in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers between commas."""
    return tuple(float(part) for part in text.split(","))


def span(text: str) -> tuple[int, int]:
    """Parse `MIN:MAX`, or one number for both."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise argparse.ArgumentTypeError(f"expected MIN:MAX such as 1:4, found {text}")
    return int(least), int(most or least)


def _mpp(text: str) -> float | str:
    """Parse a number, or the name of a CSV."""
    try:
        return positive(text)
    except ValueError:
        return text


def positive(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value
