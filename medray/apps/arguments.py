"""What the command `medray` takes: its commands and their options."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import yaml

_SLIDES = "slide files, globs, folders, s3:// or gs:// addresses, or a dataset"
_RECIPE = "name (see `medray recipes`), or path: has a / or ends in .yaml"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; changed keys of a recipe may also follow the options.

    argparse would only take them beside the recipe itself.
    """
    parser = _build_parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="medray",
        description="Pathology slides on Ray: ingest, train, infer, evaluate.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("medray")
    parser.add_argument("--version", action="version", version=f"medray {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-v", "--verbose", action="store_true", help="say more")
        return sub

    sub = command("demo", "the whole way on generated slides, with a report")
    sub.add_argument("--out", default="demo", help="folder to work in (demo)")

    sub = command("check", "slides and annotations as medray understands them")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", metavar="DIR", help="for check.html and slides.csv")
    sub.add_argument("--annotations", metavar="DIR", help="files named like the slides")
    sub.add_argument(
        "--classes",
        type=_names,
        default=("background", "tumour"),
        metavar="A,B",
        help="class names by label value, background first (background,tumour)",
    )
    _add_reading(sub)

    sub = command("ingest", "slides and annotations into a dataset")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="DATASET", help="dataset to make")
    sub.add_argument("--annotations", metavar="DIR", help="files named like the slides")
    sub.add_argument(
        "--classes",
        type=_names,
        default=(),
        metavar="A,B",
        help="class names by label value, background first (background,tumour; of "
        "class folders their names)",
    )
    _add_reading(sub)
    sub.add_argument("--groups", metavar="CSV", help="slide,group: patients")
    sub.add_argument("--splits", metavar="CSV", help="slide,split: train, val or test")
    sub.add_argument(
        "--fractions",
        type=_numbers,
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

    _add_partial_ok(sub)

    command("recipes", "the recipes that come with medray, by name")

    sub = command("train", "a recipe and a dataset into a model")
    sub.add_argument("recipe", metavar="RECIPE", help=_RECIPE)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="changed keys")
    sub.add_argument("--data", required=True, metavar="DATASET", help="from ingest")
    sub.add_argument("--out", required=True, metavar="MODEL", help="folder to make")
    sub.add_argument(
        "--labels",
        metavar="CSV",
        help="slide,label[,patient]: a model of slides; --data is from embed",
    )
    sub.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="seeds: mean, spread (1)"
    )

    sub = command("tune", "a recipe with several values for its keys")
    sub.add_argument(
        "recipe", metavar="RECIPE", help=f"with --grid; else a sweep. {_RECIPE}"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="changed keys")
    sub.add_argument("--data", required=True, metavar="DATASET", help="from ingest")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--grid",
        action="append",
        type=_key_values,
        metavar="key=[A,B]",
        help="values of a key; several such options: all combinations",
    )
    sub.add_argument(
        "--asha",
        type=int,
        default=0,
        metavar="N",
        help="end those that are behind after N epochs (0: none)",
    )

    sub = command("infer", "slides and a model into masks")
    sub.usage = "%(prog)s SLIDES ... --model MODEL ... --out RUN [OPTIONS]"
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="RUN", help="folder to make")
    _add_partial_ok(sub)
    _add_run_options(sub)

    sub = command("embed", "slides and a frozen encoder into features of tiles")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="FEATURES", help="folder to make")
    _add_partial_ok(sub)
    sub.add_argument(
        "--encoder", required=True, metavar="NAME", help="a network's name in timm"
    )
    sub.add_argument(
        "--weights", required=True, metavar="FILE", help="its weights; see docs"
    )
    sub.add_argument(
        "--tile-mpp",
        type=_positive,
        default=0.5,
        metavar="UM",
        help="um per pixel of the tiles (0.5)",
    )
    _add_reading(sub)
    sub.add_argument(
        "--tile", type=int, default=224, metavar="PX", help="side of a tile (224)"
    )
    sub.add_argument(
        "--tissue",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="least share of tissue of a tile (0.25)",
    )
    _add_precision(sub)

    sub = command("plan", "what infer would take: windows, memory, time, cost")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", default="", metavar="RUN", help="keep it there")
    sub.add_argument("--sample", type=int, default=200, help="slides looked at (200)")
    sub.add_argument("--price", type=_positive, help="of an hour of a lane's machine")
    _add_run_options(sub)

    sub = command("evaluate", "a run and the truth into a report")
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="from infer, or a classifier's MODEL (several: ensemble)",
    )
    sub.add_argument(
        "--truth",
        required=True,
        help="dataset, folder of annotations like slides, or CSV of slides' labels",
    )
    sub.add_argument("--out", required=True, metavar="REPORT", help="folder to make")
    sub.add_argument("--split", choices=("train", "val", "test"), help="of the dataset")
    sub.add_argument(
        "--cohorts",
        metavar="CSV",
        help="slide,scanner,site,...: scores by each; patient: intervals over patients",
    )
    sub.add_argument(
        "--vote", action="store_true", help="of several models, not their mean"
    )
    sub.add_argument(
        "--tta",
        choices=("none", "flips", "all"),
        default="none",
        help="a classifier sees images mirrored, turned too",
    )
    sub.add_argument(
        "--beside", metavar="REPORT", help="of another classifier, to compare with"
    )

    sub = command("export", "a model for another runtime")
    sub.add_argument("model", metavar="MODEL", help="from train")
    sub.add_argument(
        "--format", required=True, help="pt2, onnx, int8, tensorrt or wsinfer"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--data", default="", help="dataset or slide to compare on (generated)"
    )
    sub.add_argument(
        "--agreement",
        type=_positive,
        metavar="P",
        help="least share of pixels with the same class (0.999, int8 0.98)",
    )
    sub = command("nightly", "what is new in an inbox into masks, a summary")
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
    _add_run_options(sub)

    sub = command("submit", "a command to a Ray cluster as a job, and see it through")
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
        type=_positive,
        default=1800.0,
        metavar="S",
        help="seconds that no head may answer (1800)",
    )

    sub = command("doctor", "what is wrong with packages, GPUs, Ray, storage")
    sub.add_argument("--model", metavar="MODEL", help="look at this one too")
    sub.add_argument("--out", metavar="URI", help="look whether it can be written")
    sub.add_argument("--address", help="of Ray: HOST:PORT or http://HOST:8265")
    sub.add_argument(
        "--kubernetes",
        action="store_true",
        help="look at the cluster of kubectl's context, or of this pod",
    )
    sub.add_argument("--namespace", help="medray's there (medray, or this pod's)")

    sub = command("explain", "what in images speaks for a class")
    sub.add_argument("model", metavar="MODEL", help="from train")
    sub.add_argument("images", nargs="+", metavar="IMAGES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--class", dest="name", default="", help="to explain (the predicted one)"
    )
    _add_reading(sub)

    sub = command("serve", "a model as an HTTP service")
    sub.add_argument("model", metavar="MODEL", help="from train or export")
    sub.add_argument(
        "--report", default="", help="a classifier's, from evaluate: its temperature"
    )
    sub.add_argument("--host", default="127.0.0.1", help="to listen at (127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="likewise (8000)")
    sub.add_argument(
        "--replicas",
        type=_span,
        default=(1, 1),
        metavar="MIN:MAX",
        help="copies of the model, as many as requests need (1:1)",
    )
    sub.add_argument(
        "--max-mpixel", type=_positive, default=64.0, metavar="N", help="an image (64)"
    )
    sub.add_argument(
        "--max-mbyte", type=_positive, default=256.0, metavar="N", help="a body (256)"
    )
    sub.add_argument(
        "--timeout-s", type=_positive, default=120.0, metavar="S", help="answer (120)"
    )
    sub.add_argument(
        "--token-file",
        default="",
        metavar="FILE",
        help="what requests must carry (environment: MEDRAY_SERVE_TOKEN)",
    )
    _add_precision(sub)

    sub = command("verify", "read a run against the digests of its commits")
    sub.add_argument("run_folder", metavar="RUN", help="from infer")

    sub = command("gc", "remove what crashed runs left, and nothing else")
    sub.add_argument("run_folder", metavar="RUN", help="from infer")
    sub.add_argument("--dry-run", action="store_true", help="only tell")

    sub = command("diff", "which regions of two runs differ")
    sub.add_argument("run_folder", metavar="RUN_A", help="from infer")
    sub.add_argument("other", metavar="RUN_B", help="from infer, of the same classes")

    sub = command("compare", "which of two runs is better, and is it chance")
    sub.add_argument("run_folder", metavar="RUN_A", help="from infer")
    sub.add_argument("other", metavar="RUN_B", help="from infer, of the same classes")
    sub.add_argument("--truth", help="dataset, or folder of annotations like slides")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")

    sub = command("review", "the most uncertain places, to correct in QuPath")
    sub.add_argument("run_folder", metavar="RUN", help="from infer with --quality")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--count", type=int, default=20, metavar="K", help="squares of 1024 px (20)"
    )

    sub = command("convert", "masks for other viewers: OME-Zarr 0.4, TIFF, with image")
    sub.add_argument("run_folder", metavar="RUN", help="from infer; or a DATASET")
    sub.add_argument(
        "--to", required=True, help="ome-zarr, ome-zarr-0.4, ome-tiff or tiff"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--with-image", action="store_true", help="the slide's image with its mask"
    )

    sub = command("view", "a run as pages in a browser")
    sub.add_argument("run_folder", metavar="RUN", help="from infer")
    sub.add_argument("--report", help="from evaluate (`report` beside RUN)")
    sub.add_argument("--truth", help="dataset, or annotations (those of the report)")
    sub.add_argument("--slides", metavar="DIR", help="where the slides were moved to")
    sub.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    sub.add_argument(
        "--token", action="store_true", help="ask for one on 127.0.0.1 too"
    )

    command("conformance", "check that stitching can be trusted here")
    return parser


def _add_partial_ok(sub: argparse.ArgumentParser) -> None:
    """Add what makes exit code 3 a success, for those that restart what fails."""
    sub.add_argument(
        "--partial-ok",
        action="store_true",
        help="exit with 0, not 3, if some slides failed",
    )


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    """Add what may be chosen about a run."""

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
    _add_reading(sub)
    _add_precision(sub)
    choice("--stitch", ("crop", "blend"), "windows' middles, or their mean")
    choice("--tta", ("none", "flips", "all"), "mirrored, turned windows too")
    flag("--vote", "of several models the commonest class, not the mean")
    sub.add_argument(
        "--thresholds",
        type=_numbers,
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
        "--patience",
        type=_positive,
        default=300.0,
        metavar="S",
        help="a region's reading may take (300 s)",
    )


def _add_precision(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        metavar="P",
        help="auto, float32, bfloat16 or float16 (auto)",
    )


def _key_values(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    found = yaml.safe_load(values) if equals else None
    if not isinstance(found, list):
        raise argparse.ArgumentTypeError(f"expected key=[A,B], found {text}")
    return key, found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _span(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise argparse.ArgumentTypeError(f"expected MIN:MAX such as 1:4, found {text}")
    return int(least), int(most or least)


def _add_reading(sub: argparse.ArgumentParser) -> None:
    """Add what can be said of slides over what their files say."""
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


def _mpp(text: str) -> float | str:
    """Take a number, or the name of a CSV."""
    try:
        return _positive(text)
    except ValueError:
        return text


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value
