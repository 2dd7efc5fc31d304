"""Commands that give a model to others."""

from __future__ import annotations

import argparse
from typing import Any

from medray.apps.commands.options import Command, add_precision, positive, span
from medray.errors import ConfigError


def _add_export(sub: argparse.ArgumentParser) -> None:
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
        type=positive,
        metavar="P",
        help="least share of pixels with the same class (0.999, int8 0.98)",
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


def _add_serve(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="from train or export")
    sub.add_argument(
        "--report", default="", help="a classifier's, from evaluate: its temperature"
    )
    sub.add_argument("--host", default="127.0.0.1", help="to listen at (127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="likewise (8000)")
    sub.add_argument(
        "--replicas",
        type=span,
        default=(1, 1),
        metavar="MIN:MAX",
        help="copies of the model, as many as requests need (1:1)",
    )
    sub.add_argument(
        "--max-mpixel", type=positive, default=64.0, metavar="N", help="an image (64)"
    )
    sub.add_argument(
        "--max-mbyte", type=positive, default=256.0, metavar="N", help="a body (256)"
    )
    sub.add_argument(
        "--timeout-s", type=positive, default=120.0, metavar="S", help="answer (120)"
    )
    sub.add_argument(
        "--token-file",
        default="",
        metavar="FILE",
        help="what requests must carry (environment: MEDRAY_SERVE_TOKEN)",
    )
    add_precision(sub)


def _serve(args: argparse.Namespace) -> Any:
    try:
        from medray.apps.serve.deployment import serve
        from medray.apps.serve.requests import Bounds
        from medray.apps.serve.settings import ServeSettings
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


COMMANDS = {
    "export": Command("a model for another runtime", _add_export, _export),
    "serve": Command("a model as an HTTP service", _add_serve, _serve),
}
