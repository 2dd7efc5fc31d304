"""Commands that judge runs and models."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import (
    SLIDES,
    Command,
    add_executor,
    add_reading,
    reading,
)
from medray.errors import ConfigError


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
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
    add_executor(sub)


def _evaluate(args: argparse.Namespace) -> Any:
    from medray.mil import holds_slide_model
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
        from medray.mil import evaluate_slides

        if args.split or _for_images(args):
            raise ConfigError(
                f"{args.runs[0]}: predictions of slides are evaluated alone, without "
                f"--split, --vote, --tta and --beside: slides seen in training never "
                f"count"
            )
        return evaluate_slides(args.runs[0], truth=args.truth, out=args.out)
    if files.exists(files.join(args.runs[0], "model.yaml")):
        from medray.evaluation import evaluate_images

        return evaluate_images(
            args.runs,
            data=args.truth,
            out=args.out,
            split=args.split or "test",
            vote=args.vote,
            tta=args.tta,
            compare=args.beside,
            executor=args.executor,
        )
    from medray.evaluation import evaluate

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
        executor=args.executor,
    )


def _for_images(args: argparse.Namespace) -> bool:
    """Return whether an option is given that only classifiers of images have."""
    return len(args.runs) > 1 or args.vote or args.tta != "none" or bool(args.beside)


def _add_explain(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="from train")
    sub.add_argument("images", nargs="+", metavar="IMAGES", help=SLIDES)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--class", dest="name", default="", help="to explain (the predicted one)"
    )
    add_reading(sub)


def _explain(args: argparse.Namespace) -> Any:
    from medray.apps.explain import explain

    return explain(
        args.model, args.images, out=args.out, name=args.name, **reading(args)
    )


def _add_diff(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN_A", help="from infer")
    sub.add_argument("other", metavar="RUN_B", help="from infer, of the same classes")


def _diff(args: argparse.Namespace) -> Any:
    from medray.evaluation import diff

    return diff(args.run_folder, args.other)


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN_A", help="from infer")
    sub.add_argument("other", metavar="RUN_B", help="from infer, of the same classes")
    sub.add_argument("--truth", help="dataset, or folder of annotations like slides")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")


def _compare(args: argparse.Namespace) -> Any:
    from medray.evaluation import compare

    return compare(args.run_folder, args.other, out=args.out, truth=args.truth)


def _add_review(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN", help="from infer with --quality")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--count", type=int, default=20, metavar="K", help="squares of 1024 px (20)"
    )


def _review(args: argparse.Namespace) -> Any:
    from medray.evaluation import review

    return review(args.run_folder, out=args.out, count=args.count)


COMMANDS = {
    "evaluate": Command("a run and the truth into a report", _add_evaluate, _evaluate),
    "explain": Command("what in images speaks for a class", _add_explain, _explain),
    "diff": Command("which regions of two runs differ", _add_diff, _diff),
    "compare": Command(
        "which of two runs is better, and is it chance", _add_compare, _compare
    ),
    "review": Command(
        "the most uncertain places, to correct in QuPath", _add_review, _review
    ),
}
