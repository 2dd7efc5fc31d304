"""The command `medray`: parse, call one function, print, exit.

Exit codes: 0 success, 3 some slides failed (0 with --partial-ok), 2 wrong request, 1
failure; 130 or 143 when Ctrl-C or SIGTERM stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler

from medray.apps.arguments import parse
from medray.apps.words import in_words
from medray.errors import ConfigError, MedrayError
from medray.execution.signals import StoppedError


def _ingest(args: argparse.Namespace) -> Any:
    if args.side is not None:
        return _ingest_images(args)
    if args.patients:
        raise ConfigError("--patients goes with --side; slides take --groups CSV")
    if args.contours:
        raise ConfigError("--contours goes with --side; slides take --annotations DIR")
    from medray.datasets.ingest import ingest

    return ingest(
        args.slides,
        out=args.out,
        annotations=args.annotations,
        classes=args.classes or ("background", "tumour"),
        **_reading(args),
        groups=args.groups,
        splits=args.splits,
        fractions=args.fractions,
        seed=args.seed,
    )


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """Gather what was said of slides over what their files say."""
    return {"mpp": args.mpp, "scene": args.scene, "plane": args.plane}


def _check(args: argparse.Namespace) -> Any:
    from medray.apps.check import check

    return check(
        args.slides,
        annotations=args.annotations,
        classes=args.classes,
        **_reading(args),
        out=args.out,
    )


def _ingest_images(args: argparse.Namespace) -> Any:
    from medray.datasets.image_folder import ingest_images

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
    )


def _train(args: argparse.Namespace) -> Any:
    if args.labels is not None:
        from medray.mil.train import train_slides

        if args.repeats != 1:
            raise ConfigError("--repeats does not go with --labels; train other seeds")
        return train_slides(
            args.recipe,
            data=args.data,
            labels=args.labels,
            out=args.out,
            overrides=args.overrides,
        )
    from medray.training.train import train

    return train(
        args.recipe,
        data=args.data,
        out=args.out,
        overrides=args.overrides,
        repeats=args.repeats,
    )


def _recipes(args: argparse.Namespace) -> Any:
    from medray.training.recipe_files import list_recipes

    return list_recipes()


def _tune(args: argparse.Namespace) -> Any:
    from medray.training.tune import tune

    return tune(
        args.recipe,
        data=args.data,
        out=args.out,
        grid=dict(args.grid) if args.grid else None,
        asha=args.asha,
        overrides=args.overrides,
    )


def _infer(args: argparse.Namespace) -> Any:
    from medray.mil.config import holds_slide_model

    if holds_slide_model(args.model[0]):
        from medray.mil.infer import infer_slides

        if len(args.slides) != 1 or len(args.model) != 1:
            raise ConfigError(
                f"{args.model[0]}: a model of slides takes one folder of features, as "
                f"`medray embed` writes it"
            )
        return infer_slides(args.slides[0], model=args.model[0], out=args.out)
    from medray.inference.infer import infer

    return infer(args.slides, model=args.model, out=args.out, options=_options(args))


def _options(args: argparse.Namespace) -> Any:
    """Gather what was said about a run."""
    from medray.inference.postprocess import Cleaning
    from medray.inference.run import Options
    from medray.models.config import Prediction

    def chosen(cls: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        return {key: value for key, value in vars(args).items() if key in names}

    prediction = Prediction(**chosen(Prediction))
    clean = Cleaning(**chosen(Cleaning))
    return Options(**chosen(Options), prediction=prediction, clean=clean)


def _embed(args: argparse.Namespace) -> Any:
    from medray.mil.embed import embed

    return embed(
        args.slides,
        encoder=args.encoder,
        weights=args.weights,
        out=args.out,
        tile_mpp=args.tile_mpp,
        **_reading(args),
        tile=args.tile,
        tissue=args.tissue,
        precision=args.precision,
    )


def _plan(args: argparse.Namespace) -> Any:
    from medray.inference.estimate import estimate

    return estimate(
        args.slides,
        model=args.model,
        options=_options(args),
        sample=args.sample,
        price=args.price,
        out=args.out,
    )


def _for_images(args: argparse.Namespace) -> bool:
    """Tell whether something is asked for that only classifiers of images have."""
    return len(args.runs) > 1 or args.vote or args.tta != "none" or bool(args.beside)


def _evaluate(args: argparse.Namespace) -> Any:
    from medray.mil.config import holds_slide_model
    from medray.storage import files

    if args.cohorts and not files.exists(files.join(args.runs[0], "run.yaml")):
        raise ConfigError(
            f"--cohorts is for a run over slides; {args.runs[0]} has no run.yaml"
        )
    if holds_slide_model(args.runs[0]):
        raise ConfigError(
            f"{args.runs[0]}: a model of slides; give `medray evaluate` the RUN of "
            f"`medray infer FEATURES --model {args.runs[0]} --out RUN`"
        )
    if files.exists(files.join(args.runs[0], "predictions.yaml")):
        from medray.mil.evaluate import evaluate_slides

        if args.split or _for_images(args):
            raise ConfigError(
                f"{args.runs[0]}: predictions of slides are evaluated alone, without "
                f"--split, --vote, --tta and --beside: slides seen in training never "
                f"count"
            )
        return evaluate_slides(args.runs[0], truth=args.truth, out=args.out)
    if files.exists(files.join(args.runs[0], "model.yaml")):
        from medray.evaluation.evaluate_images import evaluate_images

        return evaluate_images(
            args.runs,
            data=args.truth,
            out=args.out,
            split=args.split or "test",
            vote=args.vote,
            tta=args.tta,
            compare=args.beside,
        )
    from medray.evaluation.evaluate import evaluate

    if _for_images(args):
        raise ConfigError(
            f"{args.runs[0]}: is no model folder; several, --vote, --tta and --beside "
            f"are for classifiers of images"
        )
    return evaluate(
        args.runs[0],
        truth=args.truth,
        out=args.out,
        split=args.split,
        cohorts=args.cohorts,
    )


def _export(args: argparse.Namespace) -> Any:
    from medray.apps.export import export

    return export(
        args.model,
        format=args.format,
        out=args.out,
        data=args.data,
        agreement=args.agreement,
    )


def _nightly(args: argparse.Namespace) -> Any:
    from medray.apps.nightly import nightly

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
    from medray.apps.doctor import doctor

    if args.namespace and not args.kubernetes:
        raise ConfigError("--namespace goes with --kubernetes")
    return doctor(
        model=args.model,
        out=args.out,
        address=args.address,
        kubernetes=args.kubernetes,
        namespace=args.namespace,
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


def _explain(args: argparse.Namespace) -> Any:
    from medray.apps.explain import explain

    return explain(
        args.model, args.images, out=args.out, name=args.name, **_reading(args)
    )


def _serve(args: argparse.Namespace) -> Any:
    try:
        from medray.apps.serve import ServeSettings, serve
        from medray.apps.serve_app import Bounds
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}; install medray with the extra `serve`"
        ) from error
    least, most = args.replicas
    settings = ServeSettings(
        model=args.model,
        report=args.report,
        precision=args.precision,
        min_replicas=least,
        max_replicas=most,
        bounds=Bounds(
            max_mpixel=args.max_mpixel,
            max_mbyte=args.max_mbyte,
            timeout_s=args.timeout_s,
        ),
        token_file=args.token_file,
    )
    return serve(settings, host=args.host, port=args.port)


def _verify(args: argparse.Namespace) -> Any:
    from medray.inference.verify import verify

    return verify(args.run_folder)


def _gc(args: argparse.Namespace) -> Any:
    from medray.inference.verify import collect

    return collect(args.run_folder, dry_run=args.dry_run)


def _diff(args: argparse.Namespace) -> Any:
    from medray.evaluation.diff import diff

    return diff(args.run_folder, args.other)


def _compare(args: argparse.Namespace) -> Any:
    from medray.evaluation.compare import compare

    return compare(args.run_folder, args.other, out=args.out, truth=args.truth)


def _review(args: argparse.Namespace) -> Any:
    from medray.evaluation.review import review

    return review(args.run_folder, out=args.out, count=args.count)


def _convert(args: argparse.Namespace) -> Any:
    from medray.apps.convert import convert

    return convert(
        args.run_folder, to=args.to, out=args.out, with_image=args.with_image
    )


def _view(args: argparse.Namespace) -> Any:
    from medray.apps.view import Viewing, view

    def announce(viewing: Viewing) -> None:
        values = dataclasses.asdict(viewing)
        if args.json:
            said = json.dumps(values, sort_keys=True)
        else:
            said = in_words("view", values)
        print(said, file=args.stdout, flush=True)

    view(
        args.run_folder,
        report=args.report,
        truth=args.truth,
        slides=args.slides,
        host=args.host,
        port=args.port,
        token=args.token,
        announce=announce,
    )


def _demo(args: argparse.Namespace) -> Any:
    from medray.apps.demo import demo

    return demo(args.out)


def _conformance(args: argparse.Namespace) -> Any:
    from medray.inference.conformance import check_engine, check_medray, medray_engine

    checks = check_engine(medray_engine("crop")) + check_medray()
    return Conformance(checks, {c.name: c.found for c in checks if not c.passed})


@dataclasses.dataclass(frozen=True)
class Conformance:
    """What came of the checks; `failed` says what was found, by name."""

    checks: list[Any]
    failed: dict[str, str]


_COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "check": _check,
    "ingest": _ingest,
    "recipes": _recipes,
    "train": _train,
    "tune": _tune,
    "infer": _infer,
    "embed": _embed,
    "plan": _plan,
    "evaluate": _evaluate,
    "export": _export,
    "nightly": _nightly,
    "submit": _submit,
    "doctor": _doctor,
    "explain": _explain,
    "serve": _serve,
    "verify": _verify,
    "gc": _gc,
    "diff": _diff,
    "compare": _compare,
    "review": _review,
    "convert": _convert,
    "view": _view,
    "demo": _demo,
    "conformance": _conformance,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code."""
    args = parse(argv)
    _set_up_logging(args.verbose)
    args.stdout = sys.stdout
    try:
        # Ray prints what happens to its nodes; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = _COMMANDS[args.command](args)
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
    some_failed = 0 if getattr(args, "partial_ok", False) else 3
    code = getattr(result, "code", some_failed if failed else 0)
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
