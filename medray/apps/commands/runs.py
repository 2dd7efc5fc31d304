"""Commands that look after a run's files, show and convert them."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import Command, add_executor
from medray.errors import ConfigError


def _add_verify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN", help="from infer")


def _verify(args: argparse.Namespace) -> Any:
    from medray.inference import verify

    return verify(args.run_folder)


def _add_gc(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN", help="from infer")
    sub.add_argument("--dry-run", action="store_true", help="only tell")


def _gc(args: argparse.Namespace) -> Any:
    from medray.inference import collect

    return collect(args.run_folder, dry_run=args.dry_run)


def _add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN", help="from infer; or a DATASET")
    sub.add_argument(
        "--to", required=True, help="ome-zarr, ome-zarr-0.4, ome-tiff or tiff"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--with-image", action="store_true", help="the slide's image with its mask"
    )
    add_executor(sub)


def _convert(args: argparse.Namespace) -> Any:
    from medray.apps.convert import convert

    return convert(
        args.run_folder,
        to=args.to,
        out=args.out,
        with_image=args.with_image,
        executor=args.executor,
    )


def _add_view(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="RUN", help="from infer")
    sub.add_argument("--report", help="from evaluate (`report` beside RUN)")
    sub.add_argument("--truth", help="dataset, or annotations (those of the report)")
    sub.add_argument("--slides", metavar="DIR", help="where the slides were moved to")
    sub.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    sub.add_argument(
        "--token", action="store_true", help="ask for one on 127.0.0.1 too"
    )


def _view(args: argparse.Namespace) -> Any:
    try:
        from medray.apps.viewer.server import view
    except ImportError as error:
        raise ConfigError(
            f"the viewer needs packages that are not here ({error.name}); install "
            f"`medray[view]`"
        ) from error

    view(
        args.run_folder,
        report=args.report,
        truth=args.truth,
        slides=args.slides,
        host=args.host,
        port=args.port,
        token=args.token,
        announce=args.announce,
    )


COMMANDS = {
    "verify": Command(
        "read a run against the digests of its commits", _add_verify, _verify
    ),
    "gc": Command("remove what crashed runs left, and nothing else", _add_gc, _gc),
    "convert": Command(
        "masks for other viewers: OME-Zarr 0.4, TIFF, with image",
        _add_convert,
        _convert,
    ),
    "view": Command("a run as pages in a browser", _add_view, _view),
}
