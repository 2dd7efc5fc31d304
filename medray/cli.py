"""The command `medray`: parse, call one function, print, exit.

Exit codes: 0 success, 3 some slides failed, 2 wrong request, 1 failure; 130 or 143 when
Ctrl-C or SIGTERM stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.logging import RichHandler

from medray.errors import ConfigError, MedrayError
from medray.interrupt import StoppedError
from medray.words import in_words

_SLIDES = "slide files, globs, folders, s3:// or gs:// addresses, or a dataset"


def _ingest(args: argparse.Namespace) -> Any:
    if args.side is not None:
        return _ingest_images(args)
    if args.patients:
        raise ConfigError("--patients goes with --side; slides take --groups CSV")
    if args.contours:
        raise ConfigError("--contours goes with --side; slides take --annotations DIR")
    from medray.ingest import ingest

    return ingest(
        args.slides,
        out=args.out,
        annotations=args.annotations,
        classes=args.classes or ("background", "tumour"),
        mpp=args.mpp,
        groups=args.groups,
        splits=args.splits,
        fractions=args.fractions,
        seed=args.seed,
    )


def _ingest_images(args: argparse.Namespace) -> Any:
    from medray.sheets import ingest_images

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
    )


def _train(args: argparse.Namespace) -> Any:
    if args.labels is not None:
        from medray.train_slides import train_slides

        if args.repeats != 1:
            raise ConfigError("--repeats does not go with --labels; train other seeds")
        return train_slides(
            args.recipe,
            data=args.data,
            labels=args.labels,
            out=args.out,
            overrides=args.overrides,
        )
    from medray.train import train

    return train(
        args.recipe,
        data=args.data,
        out=args.out,
        overrides=args.overrides,
        repeats=args.repeats,
    )


def _tune(args: argparse.Namespace) -> Any:
    from medray.tune import tune

    return tune(
        args.recipe,
        data=args.data,
        out=args.out,
        grid=dict(args.grid) if args.grid else None,
        asha=args.asha,
        overrides=args.overrides,
    )


def _infer(args: argparse.Namespace) -> Any:
    from medray.slide_model import holds_slide_model

    if holds_slide_model(args.model[0]):
        from medray.infer_slides import infer_slides

        if len(args.slides) != 1 or len(args.model) != 1:
            raise ConfigError(
                f"{args.model[0]}: a model of slides takes one folder of features, as "
                f"`medray embed` writes it"
            )
        return infer_slides(args.slides[0], model=args.model[0], out=args.out)
    from medray.infer import infer

    return infer(args.slides, model=args.model, out=args.out, options=_options(args))


def _options(args: argparse.Namespace) -> Any:
    """Gather what was said about a run."""
    from medray.clean import Cleaning
    from medray.models.config import Prediction
    from medray.run import Options

    def chosen(cls: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        return {key: value for key, value in vars(args).items() if key in names}

    prediction = Prediction(**chosen(Prediction))
    clean = Cleaning(**chosen(Cleaning))
    return Options(**chosen(Options), prediction=prediction, clean=clean)


def _embed(args: argparse.Namespace) -> Any:
    from medray.embed import embed

    return embed(
        args.slides,
        encoder=args.encoder,
        weights=args.weights,
        out=args.out,
        mpp=args.mpp,
        tile=args.tile,
        tissue=args.tissue,
        precision=args.precision,
    )


def _plan(args: argparse.Namespace) -> Any:
    from medray.estimate import estimate

    return estimate(
        args.slides,
        model=args.model,
        options=_options(args),
        sample=args.sample,
        price=args.price,
        out=args.out,
    )


def _evaluate(args: argparse.Namespace) -> Any:
    from medray.slide_model import holds_slide_model
    from medray.store import files

    if holds_slide_model(args.runs[0]):
        raise ConfigError(
            f"{args.runs[0]}: a model of slides; give `medray evaluate` the RUN of "
            f"`medray infer FEATURES --model {args.runs[0]} --out RUN`"
        )
    if files.exists(files.join(args.runs[0], "predictions.yaml")):
        from medray.evaluate_slides import evaluate_slides

        if args.split or len(args.runs) > 1 or args.vote or args.beside:
            raise ConfigError(
                f"{args.runs[0]}: predictions of slides are evaluated alone, without "
                f"--split, --vote and --beside: slides seen in training never count"
            )
        return evaluate_slides(args.runs[0], truth=args.truth, out=args.out)
    if files.exists(files.join(args.runs[0], "model.yaml")):
        from medray.evaluate_images import evaluate_images

        return evaluate_images(
            args.runs,
            data=args.truth,
            out=args.out,
            split=args.split or "test",
            vote=args.vote,
            compare=args.beside,
        )
    from medray.evaluate import evaluate

    if len(args.runs) > 1 or args.vote or args.beside:
        raise ConfigError(
            f"{args.runs[0]}: is no model folder; several, --vote and --beside are for "
            f"classifiers of images"
        )
    return evaluate(args.runs[0], truth=args.truth, out=args.out, split=args.split)


def _export(args: argparse.Namespace) -> Any:
    from medray.export import export

    return export(
        args.model,
        format=args.format,
        out=args.out,
        data=args.data,
        agreement=args.agreement,
    )


def _nightly(args: argparse.Namespace) -> Any:
    from medray.nightly import nightly

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
        options=_options(args),
    )


def _doctor(args: argparse.Namespace) -> Any:
    from medray.doctor import doctor

    return doctor(model=args.model, out=args.out, address=args.address)


def _explain(args: argparse.Namespace) -> Any:
    from medray.explain import explain

    return explain(args.model, args.images, out=args.out, name=args.name)


def _verify(args: argparse.Namespace) -> Any:
    from medray.verify import verify

    return verify(args.run_folder)


def _gc(args: argparse.Namespace) -> Any:
    from medray.verify import collect

    return collect(args.run_folder, dry_run=args.dry_run)


def _diff(args: argparse.Namespace) -> Any:
    from medray.verify import diff

    return diff(args.run_folder, args.other)


def _demo(args: argparse.Namespace) -> Any:
    from medray.demo import demo

    return demo(args.out)


def _conformance(args: argparse.Namespace) -> Any:
    from medray.conformance import check_engine, check_medray, medray_engine

    checks = check_engine(medray_engine("crop")) + check_medray()
    return Conformance(checks, {c.name: c.found for c in checks if not c.passed})


@dataclasses.dataclass(frozen=True)
class Conformance:
    """What came of the checks; `failed` says what was found, by name."""

    checks: list[Any]
    failed: dict[str, str]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="medray",
        description="Pathology slides on Ray: ingest, train, infer, evaluate.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("medray")
    parser.add_argument("--version", action="version", version=f"medray {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], Any], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-v", "--verbose", action="store_true", help="say more")
        return sub

    sub = command("demo", _demo, "the whole way on generated slides, with a report")
    sub.add_argument("--out", default="demo", help="folder to work in (demo)")

    sub = command("ingest", _ingest, "slides and annotations into a dataset")
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
    sub.add_argument("--mpp", type=_positive, help="um per pixel if a file is silent")
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

    sub = command("train", _train, "a recipe and a dataset into a model")
    sub.add_argument("recipe", metavar="RECIPE", help="YAML file, see recipes/")
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

    sub = command("tune", _tune, "a recipe with several values for its keys")
    sub.add_argument("recipe", metavar="RECIPE", help="YAML, or a sweep")
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

    sub = command("infer", _infer, "slides and a model into masks")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="RUN", help="folder to make")
    _add_run_options(sub)

    sub = command("embed", _embed, "slides and a frozen encoder into features of tiles")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="FEATURES", help="folder to make")
    sub.add_argument(
        "--encoder", required=True, metavar="NAME", help="a network's name in timm"
    )
    sub.add_argument(
        "--weights", required=True, metavar="FILE", help="its weights; see docs"
    )
    sub.add_argument("--mpp", type=_positive, default=0.5, help="um per pixel (0.5)")
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

    sub = command("plan", _plan, "what infer would take: windows, memory, time, cost")
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=_SLIDES)
    sub.add_argument("--out", default="", metavar="RUN", help="keep it there")
    sub.add_argument("--sample", type=int, default=200, help="slides looked at (200)")
    sub.add_argument("--price", type=_positive, help="of an hour of a lane's machine")
    _add_run_options(sub)

    sub = command("evaluate", _evaluate, "a run and the truth into a report")
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
        "--vote", action="store_true", help="of several models, not their mean"
    )
    sub.add_argument(
        "--beside", metavar="REPORT", help="of another classifier, to compare with"
    )

    sub = command("export", _export, "a model for another runtime")
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
    sub = command("nightly", _nightly, "what is new in an inbox into masks, a summary")
    sub.add_argument("--inbox", required=True, metavar="URI", help="slides arrive here")
    sub.add_argument("--out", required=True, metavar="URI", help="where nights go")
    sub.add_argument("--truth", metavar="URI", help="dataset, or folder of annotations")
    sub.add_argument("--reference", metavar="DATASET", help="trained on: watch drift")
    sub.add_argument("--webhook", metavar="URL", help="gets the summary as JSON")
    sub.add_argument(
        "--settle", type=float, default=60.0, metavar="S", help="unchanged for (60 s)"
    )
    sub.add_argument("--night", metavar="YYYY-MM-DD", help="its date (today, UTC)")
    sub.add_argument(
        "--tries", type=int, default=3, metavar="N", help="nights for a failure (3)"
    )
    _add_run_options(sub)

    sub = command("doctor", _doctor, "what is wrong with packages, GPUs, Ray, storage")
    sub.add_argument("--model", metavar="MODEL", help="look at this one too")
    sub.add_argument("--out", metavar="URI", help="look whether it can be written")
    sub.add_argument("--address", help="of Ray: HOST:PORT or http://HOST:8265")

    sub = command("explain", _explain, "what in images speaks for a class")
    sub.add_argument("model", metavar="MODEL", help="from train")
    sub.add_argument("images", nargs="+", metavar="IMAGES", help=_SLIDES)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--class", dest="name", default="", help="to explain (the predicted one)"
    )

    sub = command("verify", _verify, "read a run against the digests of its commits")
    sub.add_argument("run_folder", metavar="RUN", help="from infer")

    sub = command("gc", _gc, "remove what crashed runs left, and nothing else")
    sub.add_argument("run_folder", metavar="RUN", help="from infer")
    sub.add_argument("--dry-run", action="store_true", help="only tell")

    sub = command("diff", _diff, "which regions of two runs differ")
    sub.add_argument("run_folder", metavar="RUN_A", help="from infer")
    sub.add_argument("other", metavar="RUN_B", help="from infer, of the same classes")

    command("conformance", _conformance, "check that stitching can be trusted here")
    return parser


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
    sub.add_argument("--mpp", type=_positive, help="um per pixel if a file is silent")
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


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code."""
    args = build_parser().parse_args(argv)
    _set_up_logging(args.verbose)
    try:
        # Ray prints what happens to its nodes; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = args.run(args)
    except StoppedError as error:
        said = f"medray {args.command}: {error}"
        return _say(args, 128 + error.signal, {"error": f"{error}"}, said)
    except KeyboardInterrupt:
        said = "stopped by SIGINT; run the same command again to go on"
        return _say(args, 130, {"error": said}, f"medray {args.command}: {said}")
    except ConfigError as error:
        return _say(args, 2, {"error": f"{error}"}, f"medray {args.command}: {error}")
    except MedrayError as error:
        return _say(args, 1, {"error": f"{error}"}, f"medray {args.command}: {error}")
    failed = getattr(result, "failed", {})
    values = dataclasses.asdict(result)
    code = getattr(result, "code", 3 if failed else 0)
    return _say(args, code, values, in_words(args.command, values))


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main(argv)
    # What Ray prints when it ends must not follow the result.
    sys.stdout = sys.stderr
    raise SystemExit(code)


def _say(
    args: argparse.Namespace, code: int, values: dict[str, Any], words: str
) -> int:
    """Print the result: JSON on stdout if asked, else words (errors on stderr)."""
    if args.json:
        print(json.dumps(values | {"exit_code": code}, sort_keys=True))
    else:
        print(words, file=sys.stderr if "error" in values else sys.stdout)
    return code


def _set_up_logging(verbose: bool) -> None:
    logger = logging.getLogger("medray")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, show_time=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


if __name__ == "__main__":
    script()
