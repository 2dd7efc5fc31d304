"""The commands of `medray`: the function of each, and where their options differ.

One file, because a command and the function that chooses what it calls are read
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cyclopts import Parameter, Token

from medray.apps.commands.groups import GROUPS
from medray.apps.commands.parser import (
    ANYWHERE,
    BY_NAME,
    LEFT_OUT,
    Change,
    Command,
    Given,
    call,
)
from medray.errors import ConfigError


def _ingest(given: Given) -> Any:
    dry = given.pop("dry_run", False)
    if "side" not in given:
        for name, instead in (
            ("patients", "--groups CSV"),
            ("contours", "--annotations DIR"),
        ):
            if name in given:
                raise ConfigError(f"--{name} goes with --side; slides take {instead}")
        return _dry_ingest(given) if dry else call("medray.datasets:ingest", given)
    if isinstance(given.get("mpp"), str) or given.keys() & {"scene", "plane"}:
        raise ConfigError(
            "--side: expected of images --mpp as a number, without --scene and --plane"
        )
    folder, *others = given.pop("slides")
    if others or "annotations" in given:
        raise ConfigError(
            "--side: expected one folder of class folders, without --annotations"
        )
    given = {"folder": folder, **given}
    if dry:
        return _dry_ingest(given)
    return call("medray.datasets:ingest_images", given)


def _dry_ingest(given: Given) -> Any:
    from medray.apps.dry_images import dry_ingest_images
    from medray.apps.dry_ingest import dry_ingest

    where = {"executor": given.pop("executor")} if "executor" in given else {}
    if "folder" in given:
        return dry_ingest_images(call("medray.datasets:settle_images", given), **where)
    return dry_ingest(call("medray.datasets:settle_ingest", given), **where)


def _train(given: Given) -> Any:
    dry = given.pop("dry_run", False)
    if "labels" not in given:
        if dry:
            return call("medray.apps.dry_train:dry_train", given)
        return call("medray.training:train", given)
    if "repeats" in given:
        raise ConfigError("--repeats does not go with --labels; train other seeds")
    if dry:
        return call("medray.mil:dry_train_slides", given)
    return call("medray.mil:train_slides", given)


def _tune(given: Given) -> Any:
    import yaml

    grid = {}
    for word in given.pop("grid", ()):
        key, equals, values = word.partition("=")
        try:
            grid[key] = yaml.safe_load(values) if equals else None
        except (yaml.YAMLError, ValueError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"--grid {word}: {problem}") from error
        if not isinstance(grid[key], list):
            raise ConfigError(f"--grid: expected key=[A,B], found {word}")
    return call("medray.training:tune", given | ({"grid": grid} if grid else {}))


def _infer(given: Given) -> Any:
    from medray.mil import holds_slide_model

    models, slides = given["model"], given["slides"]
    if not holds_slide_model(models[0]):
        return call("medray.inference:infer", given)
    if len(slides) != 1 or len(models) != 1:
        raise ConfigError(
            f"{models[0]}: a model of slides takes one folder of features, as "
            f"`medray embed` writes it"
        )
    del given["slides"]
    return call(
        "medray.mil:infer_slides", given | {"features": slides[0], "model": models[0]}
    )


def _evaluate(given: Given) -> Any:
    from medray.mil import holds_slide_model
    from medray.storage import files

    def holds(name: str) -> bool:
        return files.exists(files.join(run, name))

    runs = given.pop("run")
    run = runs[0]
    for_images = len(runs) > 1 or given.keys() & {"vote", "tta", "compare"}
    if "cohorts" in given and not holds("run.yaml"):
        raise ConfigError(f"--cohorts is for a run over slides; {run} has no run.yaml")
    if holds_slide_model(run):
        raise ConfigError(
            f"{run}: a model of slides; give `medray evaluate` the RUN of "
            f"`medray infer FEATURES --model {run} --out RUN`"
        )
    if holds("predictions.yaml"):
        if "split" in given or for_images:
            raise ConfigError(
                f"{run}: predictions of slides are evaluated alone, without --split, "
                f"--vote, --tta and --beside: slides seen in training never count"
            )
        return call("medray.mil:evaluate_slides", {"run": run, **given})
    if holds("model.yaml"):
        given = {"model": runs, "data": given.pop("truth"), **given}
        return call("medray.evaluation:evaluate_images", given)
    if for_images:
        raise ConfigError(
            f"{run}: is no model folder; several, --vote, --tta and --beside are for "
            f"classifiers of images"
        )
    return call("medray.evaluation:evaluate", {"run": run, **given})


def _review(given: Given) -> Any:
    runs = given.pop("run")
    if "by_loss" in given:
        return call("medray.evaluation:review_images", {"reports": runs, **given})
    if len(runs) > 1:
        raise ConfigError(
            f"expected one run, found {len(runs)}; several reports go with --by-loss "
            f"DATASET"
        )
    return call("medray.evaluation:review", {"run": runs[0], **given})


def _parse_span(_: Any, tokens: Sequence[Token]) -> tuple[int, int]:
    """Parse `MIN:MAX`, or one number for both."""
    least, _, most = tokens[0].value.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise ValueError(f"expected MIN:MAX such as 1:4, found {tokens[0].value}")
    return int(least), int(most or least)


def _serve(given: Given) -> Any:
    try:
        return call("medray.apps.serve.deployment:serve", given)
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}; install medray with the extra `serve`"
        ) from error


def _view(given: Given) -> Any:
    try:
        return call("medray.apps.viewer.server:view", given)
    except ImportError as error:
        raise ConfigError(
            f"the viewer needs packages that are not here ({error.name}); install "
            f"`medray[view]`"
        ) from error


def _help(text: str) -> Change:
    return Change(parameter=Parameter(help=text))


_RUN = Change(
    name="RUN", parameter=Parameter(help="Folder of the run", group=GROUPS["run"])
)
_FILES = _help("Files (of a list: `$(cat LIST)`), globs, folders, addresses of buckets")
_SLIDES = _help(
    "Files (of a list: `$(cat LIST)`), globs, folders, addresses, a dataset"
)
_OUT = _help("Folder to make; the same command again does what is missing there")
# Of infer, plan and nightly.
_PREDICTION = {
    "mpp": _help("Correct level 0's microns per pixel, or CSV; masks have the model's"),
    "region": _help(
        "Side of a region, n x 512 pixels; less takes less memory (0: auto)"
    ),
}
_EXECUTOR = _help(
    "On the Ray of RAY_ADDRESS, in processes here, or in this one (local)"
)
_OPTION = Change(kind=BY_NAME)
_OVERRIDES = Change(
    name="key=value",
    kind=ANYWHERE,
    type=str,
    parameter=Parameter(
        help="Keys of the recipe to change: schedule.epochs=50 optimizer.lr=1e-4"
    ),
)

COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole way on generated slides, with a report",
        ("medray.apps.demo:demo",),
        {"out": _OPTION, "recipe": LEFT_OUT, "options": LEFT_OUT},
    ),
    "check": Command(
        "slides and annotations as medray understands them",
        ("medray.apps.check_slides:check",),
        {"slides": _FILES},
    ),
    "ingest": Command(
        "slides and annotations into a dataset",
        ("medray.datasets:ingest", "medray.datasets:ingest_images"),
        {"folder": LEFT_OUT, "slides": _FILES, "out": _OUT},
        run=_ingest,
        partial_ok=True,
        dry_run=(
            "medray.apps.dry_ingest:dry_ingest",
            "medray.apps.dry_images:dry_ingest_images",
        ),
    ),
    "recipes": Command(
        "the recipes that come with medray, by name", ("medray.training:list_recipes",)
    ),
    "train": Command(
        "a recipe and a dataset into a model",
        ("medray.training:train", "medray.mil:train_slides"),
        {"overrides": _OVERRIDES, "out": _OUT},
        run=_train,
        dry_run=("medray.apps.dry_train:dry_train", "medray.mil:dry_train_slides"),
    ),
    "tune": Command(
        "a recipe with several values for its keys",
        ("medray.training:tune",),
        {
            "overrides": _OVERRIDES,
            "grid": Change(
                type=list[str] | None,
                parameter=Parameter(consume_multiple=False, metavar="key=[A,B]"),
            ),
        },
        run=_tune,
    ),
    "infer": Command(
        "slides and a model into masks",
        ("medray.inference:infer", "medray.mil:infer_slides"),
        {
            "features": LEFT_OUT,
            "slides": _SLIDES,
            "out": _OUT,
            "executor": _EXECUTOR,
            **_PREDICTION,
        },
        run=_infer,
        partial_ok=True,
    ),
    "embed": Command(
        "slides and a frozen encoder into features of tiles",
        ("medray.mil:embed",),
        {"region": LEFT_OUT, "slides": _SLIDES, "out": _OUT},
        partial_ok=True,
    ),
    "plan": Command(
        "what infer would take: windows, memory, time, cost",
        ("medray.inference:estimate",),
        {"slides": _SLIDES, "executor": _EXECUTOR, **_PREDICTION},
    ),
    "evaluate": Command(
        "a run and the truth into a report",
        (
            "medray.evaluation:evaluate",
            "medray.evaluation:evaluate_images",
            "medray.mil:evaluate_slides",
        ),
        {
            "run": Change(
                type=list[str],
                parameter=Parameter(
                    help="From infer, or a classifier's MODEL; several are an ensemble",
                    consume_multiple=True,
                ),
            ),
            "truth": Change(
                parameter=Parameter(
                    help="Dataset, folder of annotations, or CSV of slides' labels"
                )
            ),
            "slides": LEFT_OUT,
            "model": LEFT_OUT,
            "data": LEFT_OUT,
            "split": Change(type=Literal["train", "val", "test"] | None),
            "compare": Change(name="--beside"),
        },
        run=_evaluate,
    ),
    "explain": Command(
        "what in images speaks for a class",
        ("medray.apps.explain:explain",),
        {"name": Change(name="--class")},
    ),
    "diff": Command(
        "which regions of two runs differ",
        ("medray.evaluation:diff",),
        {"out": _RUN},
    ),
    "compare": Command(
        "which of two runs is better, and is it chance", ("medray.evaluation:compare",)
    ),
    "review": Command(
        "most uncertain places, to correct in QuPath; hardest images",
        ("medray.evaluation:review", "medray.evaluation:review_images"),
        {
            "run": Change(
                type=list[str],
                parameter=Parameter(
                    help="From infer; with --by-loss reports of evaluate, of all folds",
                    consume_multiple=True,
                ),
            ),
            "reports": LEFT_OUT,
            "by_loss": Change(type=str | None),
        },
        run=_review,
    ),
    "verify": Command(
        "read a run against the digests of its commits",
        ("medray.inference:verify",),
        {"out": _RUN},
    ),
    "gc": Command(
        "remove what crashed runs left, and nothing else",
        ("medray.inference:collect",),
        {"out": _RUN},
    ),
    "convert": Command(
        "masks for other viewers: OME-Zarr 0.4, TIFF, with image",
        ("medray.apps.convert:convert",),
    ),
    "view": Command(
        "a run as pages in a browser",
        ("medray.apps.viewer.server:view",),
        {"announce": LEFT_OUT},
        run=_view,
    ),
    "export": Command("a model for another runtime", ("medray.apps.export:export",)),
    "serve": Command(
        "a model as an HTTP service",
        ("medray.apps.serve.deployment:serve",),
        {
            "replicas": Change(
                parameter=Parameter(
                    converter=_parse_span, n_tokens=1, metavar="MIN:MAX"
                ),
            ),
        },
        run=_serve,
    ),
    "nightly": Command(
        "what is new in an inbox into masks, a summary",
        ("medray.apps.nightly.night:nightly",),
        {"inbox": _OPTION, **_PREDICTION},
    ),
    "submit": Command(
        "a command to a Ray cluster as a job, and see it through",
        ("medray.apps.submit:submit",),
    ),
    "doctor": Command(
        "what is wrong with packages, GPUs, Ray, storage",
        ("medray.apps.doctor.doctor:doctor",),
    ),
    "conformance": Command(
        "check that stitching can be trusted here",
        ("medray.inference:check_conformance",),
    ),
}
"""By name, in the order of `medray --help`."""
