"""Commands that train models."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import Command, key_values, no_options
from medray.errors import ConfigError

_RECIPE = "name (see `medray recipes`), or path: has a / or ends in .yaml"


def _add_train(sub: argparse.ArgumentParser) -> None:
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


def _train(args: argparse.Namespace) -> Any:
    if args.labels is not None:
        from medray.mil import train_slides

        if args.repeats != 1:
            raise ConfigError("--repeats does not go with --labels; train other seeds")
        return train_slides(
            args.recipe,
            data=args.data,
            labels=args.labels,
            out=args.out,
            overrides=args.overrides,
        )
    from medray.training import train

    return train(
        args.recipe,
        data=args.data,
        out=args.out,
        overrides=args.overrides,
        repeats=args.repeats,
    )


def _add_tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "recipe", metavar="RECIPE", help=f"with --grid; else a sweep. {_RECIPE}"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="changed keys")
    sub.add_argument("--data", required=True, metavar="DATASET", help="from ingest")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--grid",
        action="append",
        type=key_values,
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


def _tune(args: argparse.Namespace) -> Any:
    from medray.training import tune

    return tune(
        args.recipe,
        data=args.data,
        out=args.out,
        grid=dict(args.grid) if args.grid else None,
        asha=args.asha,
        overrides=args.overrides,
    )


def _recipes(_: argparse.Namespace) -> Any:
    from medray.training import list_recipes

    return list_recipes()


COMMANDS = {
    "recipes": Command(
        "the recipes that come with medray, by name", no_options, _recipes
    ),
    "train": Command("a recipe and a dataset into a model", _add_train, _train),
    "tune": Command("a recipe with several values for its keys", _add_tune, _tune),
}
