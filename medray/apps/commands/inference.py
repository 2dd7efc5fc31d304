"""Commands that apply a model to slides."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import (
    SLIDES,
    Command,
    add_executor,
    add_partial_ok,
    add_precision,
    add_reading,
    add_run_options,
    positive,
    reading,
    run_options,
)
from medray.errors import ConfigError


def _add_infer(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s SLIDES ... --model MODEL ... --out RUN [OPTIONS]"
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=SLIDES)
    sub.add_argument("--out", required=True, metavar="RUN", help="folder to make")
    add_executor(sub)
    add_partial_ok(sub)
    add_run_options(sub)


def _infer(args: argparse.Namespace) -> Any:
    from medray.mil import holds_slide_model

    if holds_slide_model(args.model[0]):
        from medray.mil import infer_slides

        if len(args.slides) != 1 or len(args.model) != 1:
            raise ConfigError(
                f"{args.model[0]}: a model of slides takes one folder of features, as "
                f"`medray embed` writes it"
            )
        return infer_slides(args.slides[0], model=args.model[0], out=args.out)
    from medray.inference import infer

    return infer(
        args.slides,
        model=args.model,
        out=args.out,
        options=run_options(args),
        executor=args.executor,
    )


def _add_embed(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=SLIDES)
    sub.add_argument("--out", required=True, metavar="FEATURES", help="folder to make")
    add_executor(sub)
    add_partial_ok(sub)
    sub.add_argument(
        "--encoder", required=True, metavar="NAME", help="a network's name in timm"
    )
    sub.add_argument(
        "--weights", required=True, metavar="FILE", help="its weights; see docs"
    )
    sub.add_argument(
        "--tile-mpp",
        type=positive,
        default=0.5,
        metavar="UM",
        help="um per pixel of the tiles (0.5)",
    )
    add_reading(sub)
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
    add_precision(sub)


def _embed(args: argparse.Namespace) -> Any:
    from medray.mil import embed

    return embed(
        args.slides,
        encoder=args.encoder,
        weights=args.weights,
        out=args.out,
        tile_mpp=args.tile_mpp,
        **reading(args),
        tile=args.tile,
        tissue=args.tissue,
        precision=args.precision,
        executor=args.executor,
    )


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("slides", nargs="+", metavar="SLIDES", help=SLIDES)
    sub.add_argument("--out", default="", metavar="RUN", help="keep it there")
    add_executor(sub)
    sub.add_argument("--sample", type=int, default=200, help="slides looked at (200)")
    sub.add_argument(
        "--price", type=positive, help="of an hour of a GPU worker's machine"
    )
    add_run_options(sub)


def _plan(args: argparse.Namespace) -> Any:
    from medray.inference import estimate

    return estimate(
        args.slides,
        model=args.model,
        options=run_options(args),
        sample=args.sample,
        price=args.price,
        out=args.out,
        executor=args.executor,
    )


COMMANDS = {
    "infer": Command("slides and a model into masks", _add_infer, _infer),
    "embed": Command(
        "slides and a frozen encoder into features of tiles", _add_embed, _embed
    ),
    "plan": Command(
        "what infer would take: windows, memory, time, cost", _add_plan, _plan
    ),
}
