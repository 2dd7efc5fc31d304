"""The steps of the golden digests: each makes something of fixed inputs and digests it.

A step is a function of its name that yields names and digests; STEPS lists them. What
several of them need (a data set, a model, a run) is made once, by a function that gives
its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inputs
import serial
import timm
import torch
import yaml
from digests import (
    digest,
    digest_array,
    digest_csv,
    digest_files,
    digest_json,
    digest_table,
    digest_weights,
)
from inputs import SHARED, Work, made
from safetensors.torch import save_file

from medray.annotations.dat_contours import read_contour
from medray.apps.demo import demo
from medray.classes import Classes
from medray.cli import main
from medray.geometry import Windows
from medray.inference.postprocess import Cleaning
from medray.inference.run import Options
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig, Prediction
from medray.models.folder import save_model
from medray.models.predict import Predictor
from medray.models.segmenters import build_segmenter
from medray.slides.opening import open_slide
from medray.training.recipe import Recipe, read_recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule

Found = Iterator[tuple[str, str]]


def medray(*words: object, code: int = 0) -> dict[str, Any]:
    """Run a command in this process; give what it says.

    Raises:
        RuntimeError: Its exit code is another.
    """
    command, *rest = map(str, words)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = main([command, "--json", *rest])
    if found != code:
        raise RuntimeError(f"medray {command}: exit code {found}: {said.getvalue()}")
    result: dict[str, Any] = json.loads(said.getvalue())
    return result


# --- what is digested of a folder -----------------------------------------------------


def of_slide(path: Path) -> str:
    """Digest a slide as it is read: levels, resolution, the middle of each level."""
    with open_slide(str(path)) as slide:
        parts: list[Any] = [slide.mpp, slide.magnification]
        for number, level in enumerate(slide.levels):
            height, width = min(level.height, 700), min(level.width, 700)
            y, x = (level.height - height) // 2, (level.width - width) // 2
            pixels = slide.read(y=y, x=x, height=height, width=width, level=number)
            parts.append([level.height, level.width, level.downsample])
            parts.append(digest_array(pixels))
    return digest(*parts)


def of_dataset(name: str, dataset: Path) -> Found:
    """Digest pixels, labels and tables of a data set."""
    yield f"{name}/slides", digest_files(dataset / "slides", "*.zarr")
    yield f"{name}/tables", digest_files(dataset, "*.parquet")


def of_model(name: str, model: Path) -> Found:
    """Digest a model: weights, configuration, scores."""
    yield f"{name}/weights", digest_weights(model / "weights.safetensors")
    config = yaml.safe_load((model / "model.yaml").read_text())
    yield f"{name}/contract", digest(config)
    yield f"{name}/metrics", digest_json(model / "metrics.json")


def of_run(name: str, run: Path) -> Found:
    """Digest masks with their layers, what was counted, outlines."""
    yield f"{name}/masks", digest_files(run / "masks", "*.zarr")
    yield f"{name}/table", digest_table(run / "slides.parquet")
    if (run / "outlines").is_dir():
        yield f"{name}/outlines", digest_files(run / "outlines", "*.geojson")


def of_report(name: str, report: Path) -> Found:
    """Digest scores and tables of a report."""
    yield f"{name}/metrics", digest_json(report / "metrics.json")
    yield f"{name}/tables", digest_files(report, "*.csv")


# --- masks ----------------------------------------------------------------------------


def write_model(
    name: str, kind: str = "pan", *, seed: int = 4, **contract: Any
) -> Path:
    """Write a model folder with random weights: noise, but always the same noise."""
    folder = Work.folder / "models" / name
    if folder.exists():
        return folder
    config = ModelConfig(
        architecture=Architecture(kind, "tu-test_resnet"),
        **{"classes": Classes(), "window": Windows(128, 96), "mpp": 0.5} | contract,
    )
    build = build_classifier if kind == "classifier" else build_segmenter
    torch.manual_seed(seed)  # its masks are neither empty nor full nor all specks
    network = build(config.architecture, len(config.classes))
    save_model(str(folder), config, network, {"f1": None})
    return folder


def options_of(**chosen: Any) -> Options:
    """Sort what is chosen about a run, as the command line does."""
    mpp = chosen.setdefault("mpp", "mpp.csv")
    if isinstance(mpp, str):
        chosen["mpp"] = str(inputs.slides() / mpp)

    def part(cls: type[Any]) -> Any:
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in chosen.items() if key in names})

    prediction = dataclasses.replace(part(Prediction), precision="float32")
    own = part(Options)
    return dataclasses.replace(own, prediction=prediction, clean=part(Cleaning))


def infer(name: str, slides: Path, models: list[Path], options: Options) -> Path:
    """Infer by a plain loop in this process, once for each name.

    It takes a second; that all of Ray's ways give the same bits is what
    `medray conformance` and the tests show, and the demo and `options/all` go them.
    """
    run = Work.folder / "runs" / name.replace("/", "-")
    if not run.exists():
        folders = [str(model) for model in models]
        predictor = Predictor.from_folders(folders, options.prediction, threads=2)
        serial.infer(slides, predictor, models, run, options)
    return run


# Every option of the docs that changes what a run writes. The rest, with reasons, is in
# docs/checks.md.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "mpp=0.25": {"mpp": "finer.csv"},
    "mpp=0.6 of all": {"mpp": 0.6},
    "stitch=blend": {"stitch": "blend"},
    "tta=flips": {"tta": "flips"},
    "tta=all": {"tta": "all"},
    "thresholds=0,0.55": {"thresholds": (0.0, 0.55)},
    "crf=5": {"crf": 5},
    "probabilities": {"probabilities": True},
    "quality": {"quality": True},
    "outlines": {"outlines": True},
    "smooth=2": {"smooth": 2},
    "holes=200": {"holes": 200},
    "smallest=500": {"smallest": 500},
    "everywhere": {"everywhere": True},
    "within": {"within": "within"},
    "coarse=4": {"coarse": 4, "thresholds": (0.0, 0.7)},
    "region=512": {"region": 512},
}
ALL = (
    *("--stitch", "blend", "--tta", "flips", "--crf", "2", "--thresholds", "0,0.4"),
    *("--smooth", "1", "--holes", "100", "--smallest", "200", "--everywhere"),
    *("--probabilities", "--quality", "--outlines", "--precision", "float32"),
)
"""Many options together, through Ray."""
CONTRACTS: dict[str, dict[str, Any]] = {
    "overlap=0": {"window": Windows(128, 128)},
    "overlap=64": {"window": Windows(128, 64)},
    "mpp=none": {"mpp": None},
    "stain=macenko": {"stain": "macenko"},
    "zscore": {"zscore": True, "mean": (0.0,) * 3, "std": (1.0,) * 3},
    "classes=3": {"seed": 6, "classes": Classes(("background", "tumour", "stroma"))},
}


def option(name: str, **chosen: Any) -> Found:
    """Masks of the six slides, with one option."""
    if "within" in chosen:
        chosen["within"] = str(inputs.slides() / "within")
    run = infer(
        name, inputs.slides() / "slides", [write_model("first")], options_of(**chosen)
    )
    yield from of_run(name, run)


@made
def everything(folder: Path) -> None:
    """A run with many options, by the command and through Ray."""
    said = inputs.slides() / "mpp.csv"
    words = ("--model", write_model("first"), "--out", folder, "--mpp", said, *ALL)
    medray("infer", inputs.slides() / "slides", *words)


def option_all(name: str) -> Found:
    """Digest the run with many options."""
    yield from of_run(name, everything())


def ensemble(name: str, vote: bool) -> Found:
    """Masks of three models together."""
    models = [
        write_model("first"),
        write_model("b", seed=5),
        write_model("c", seed=9),
    ]
    run = infer(name, inputs.slides() / "slides", models, options_of(vote=vote))
    yield from of_run(name, run)


def contract(name: str, **contract: Any) -> Found:
    """Masks of a model that looks at slides in another way."""
    model = write_model(name.replace("/", "-"), **contract)
    yield from of_run(
        name, infer(name, inputs.slides() / "slides", [model], options_of())
    )


def classifier(name: str) -> Found:
    """Heat maps of a classifier."""
    model = write_model("classifier", "classifier", seed=6)
    options = options_of(probabilities=True)
    yield from of_run(name, infer(name, inputs.slides() / "slides", [model], options))


# --- data sets ------------------------------------------------------------------------


def generated(name: str) -> Found:
    """The inputs themselves: where they differ, all that follows does."""
    for folder in (inputs.slides(), inputs.annotated(), inputs.known()):
        for path in sorted((folder / "slides").iterdir()):
            if path.stem != "s3":  # damaged in the middle
                yield f"{name}/{path.stem}", of_slide(path)
    for folder in (inputs.images(), inputs.cells()):
        for kind in ("png", "bmp", "jpg"):
            paths = sorted(folder.rglob(f"*.{kind}"))
            yield (
                f"{name}/{folder.name}-{kind}",
                digest(*(p.read_bytes() for p in paths)),
            )
    yield f"{name}/model", digest_weights(write_model("first") / "weights.safetensors")


def annotations(name: str) -> Found:
    """A data set of outlines in every format, patients in one split."""
    folder = inputs.annotated()
    medray(
        *("ingest", folder / "slides", "--annotations", folder / "annotations"),
        *("--groups", folder / "groups.csv", "--out", folder / "dataset"),
    )
    yield from of_dataset(name, folder / "dataset")


@made
def slide_data(folder: Path) -> None:
    """A data set to learn from; one of its slides has no annotation."""
    known = inputs.known()
    medray(
        *("ingest", known / "slides", "--annotations", known / "annotations"),
        *("--fractions", "0.6,0.4,0", "--out", folder),
    )


@made
def image_data(folder: Path) -> None:
    """A data set of images in class folders."""
    patients = ("--patients", r"^(P\d+)")
    medray(
        *("ingest", inputs.images() / "classes", "--side", "64", *patients),
        *("--fractions", "0.5,0.25,0.25", "--out", folder),
    )


@made
def cell_data(folder: Path) -> None:
    """A data set of cells with contours."""
    patients = ("--patients", r"^(\d+)_", "--contours")
    medray(
        *("ingest", inputs.cells() / "classes", "--side", "64", *patients),
        *("--fractions", "0.5,0.25,0.25", "--out", folder),
    )


def dataset(name: str, data: Callable[[], Path]) -> Found:
    """Digest a data set."""
    yield from of_dataset(name, data())


# --- trainings ------------------------------------------------------------------------

SMALL = ("batch=4", "micro_batch_size=2", "data.samples=8", "precision=float32")
TINY = "model.encoder=tu-test_resnet"
IMAGES = (
    *("data.crop=64", "window.size=64", "window.stride=64", "model.encoder=resnet10t"),
    *("schedule.epochs=2", "weights=null", "schedule.phases=[]"),
)
SEGMENTERS: dict[str, tuple[str, ...]] = {
    "unet": ("schedule.epochs=2", TINY),
    "deeplab": ("schedule.epochs=1", TINY),
    "segformer": ("schedule.epochs=1", TINY),
    "upernet": ("schedule.epochs=1", TINY),
    "nuclei": ("schedule.epochs=2", "data.hard=0.5", TINY),
    "highres-unet": ("schedule.epochs=2", "data.crop=[64,96]", TINY),
    "distill": ("schedule.epochs=1", "teacher.model=unet", TINY),
    "semi-supervised": ("schedule.epochs=2", "stain=macenko", TINY),
    "prune": ("schedule.epochs=1", "prune.model=highres-unet", TINY),
}
CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "cells-small": IMAGES,
    "malaria-resnet50v2": IMAGES,
    "pneumonia-transfer": IMAGES,
}


def trained(recipe: str, data: Path, *words: str) -> Path:
    """Train a recipe of medray's, made small, in this process; once."""
    out = Work.folder / "trained" / recipe
    if not out.exists():
        crop = () if any("data.crop" in word for word in words) else ("data.crop=64",)
        settings = read_recipe(recipe, [*SMALL, *crop, *words])
        serial.train(settings, str(data), str(out))
    return out


def segmenter(name: str, recipe: str) -> Found:
    """A segmenter by one of the recipes."""
    words = []
    for word in SEGMENTERS[recipe]:
        key, _, other = word.partition("=")
        if key in ("teacher.model", "prune.model"):
            other_model = trained(other, slide_data(), *SEGMENTERS[other])
            word = f"{key}={other_model}"
        words.append(word)
    yield from of_model(name, trained(recipe, slide_data(), *words))


def image_classifier(name: str, recipe: str) -> Found:
    """A classifier of images by one of the recipes."""
    yield from of_model(name, trained(recipe, image_data(), *CLASSIFIERS[recipe]))


PHASES = (
    "schedule.phases=[{epochs: 1, train: head}, {epochs: 1, train: last, stages: 1}, "
    "{epochs: 1, train: adaptive, share: 0.5}, {train: all, lr: 0.1}]"
)


def cell_classifier(name: str) -> Found:
    """A classifier of pixels and contours, its encoder from a file, in four phases."""
    weights = Work.folder / "encoder.safetensors"
    if not weights.exists():
        torch.manual_seed(2)
        save_file(timm.create_model("resnet10t").state_dict(), weights)
    words = (*IMAGES[:4], "model.morphology=true", "schedule.epochs=4")
    words = (*words, f"weights={weights}", PHASES)
    model = trained("cervical-resnet50v2-attention", cell_data(), *words)
    yield from of_model(name, model)
    report = Work.folder / "cell-report"
    medray("evaluate", model, "--truth", cell_data(), "--out", report)
    yield from of_report(f"{name}/report", report)


def slide_classifier(name: str) -> Found:
    """Tiles' vectors, and models of slides' labels: trained, inferred, evaluated."""
    many, out = inputs.many(), Work.folder / "mil"
    torch.manual_seed(3)
    encoder = timm.create_model("test_resnet", num_classes=0)
    out.mkdir()
    save_file(encoder.state_dict(), out / "encoder.safetensors")
    medray(
        *("embed", many / "slides", "--encoder", "test_resnet", "--tile", "96"),
        *("--weights", out / "encoder.safetensors", "--precision", "float32"),
        *("--tissue", "0.1", "--out", out / "features"),
    )
    yield f"{name}/features", digest_files(out / "features" / "features", "*.zarr")
    yield f"{name}/table", digest_table(out / "features" / "slides.parquet")
    for recipe in ("attention-mil", "linear"):
        model, run = out / recipe, out / f"{recipe}-run"
        labels = many / "labels.csv"
        medray(
            *("train", recipe),
            *("--data", out / "features", "--labels", labels, "--out", model),
            *("epochs=6", "fractions=[0.4,0.3,0.3]"),
            *(("head.hidden=16", "head.attention=8") if recipe != "linear" else ()),
        )
        yield from of_model(f"{name}/{recipe}", model)
        medray("infer", out / "features", "--model", model, "--out", run)
        yield f"{name}/{recipe}/predictions", digest_table(run / "slides.parquet")
        report = out / f"{recipe}-report"
        medray("evaluate", run, "--truth", labels, "--out", report)
        yield from of_report(f"{name}/{recipe}/report", report)
    run = out / "attention-mil-run"
    yield f"{name}/attention", digest_files(run / "attention", "*.parquet")
    yield f"{name}/heatmaps", digest_files(run / "heatmaps", "*.png")


# --- reports, copies ------------------------------------------------------------------


def image_reports(name: str) -> Found:
    """Reports of classifiers: one compared with another, mirrored, a vote of three."""
    models = [trained(r, image_data(), *words) for r, words in CLASSIFIERS.items()]
    ways: dict[str, tuple[list[Path], tuple[object, ...]]] = {
        "one": (models[:1], ()),
        "beside": (models[1:2], ("--beside", Work.folder / "image-one")),
        "tta=all": (models[:1], ("--tta", "all")),
        "mean": (models, ()),
        "vote": (models, ("--vote",)),
    }
    for way, (which, words) in ways.items():
        out = Work.folder / f"image-{way}"
        medray("evaluate", *which, "--truth", image_data(), "--out", out, *words)
        yield from of_report(f"{name}/{way}", out)


def slide_report(name: str) -> Found:
    """The report of a run with probabilities and layers, over scanners and patients."""
    truth, out = inputs.slides() / "svg", Work.folder / "report"
    cohorts = ("--cohorts", inputs.slides() / "cohorts.csv")
    medray("evaluate", everything(), "--truth", truth, "--out", out, *cohorts)
    yield from of_report(name, out)


def comparison(name: str) -> Found:
    """Two runs compared."""
    out = Work.folder / "compared"
    slides, models = inputs.slides() / "slides", [write_model("first")]
    runs = [
        infer(f"options/{option}", slides, models, options_of(**OPTIONS[option]))
        for option in ("default", "stitch=blend")
    ]
    medray("compare", *runs, "--truth", inputs.slides() / "svg", "--out", out)
    yield f"{name}/scores", digest_json(out / "compare.json")
    yield f"{name}/slides", digest_csv(out / "slides.csv")


def to_review(name: str) -> Found:
    """The most uncertain places of a run."""
    out = Work.folder / "review"
    medray("review", everything(), "--out", out, "--count", "3")
    yield f"{name}/squares", digest_table(out / "squares.parquet")
    yield f"{name}/outlines", digest_files(out, "*.geojson")


def copies(name: str) -> Found:
    """Copies for other viewers."""
    run, data = everything(), slide_data()
    for kind, source, words in [
        ("ome-zarr", run, ("--with-image",)),
        ("ome-zarr-0.4", run, ()),
        ("ome-zarr-0.4", run, ("--with-image",)),
        ("ome-zarr-0.4", data, ()),
        ("ome-tiff", run, ()),
        ("tiff", run, ()),
    ]:
        this = f"{kind}-of-{'data' if source == data else 'run'}{'-image' * len(words)}"
        out = Work.folder / "copies" / this
        medray("convert", source, "--to", kind, "--out", out, *words)
        pattern = "*.zarr" if "zarr" in kind else "*.tif"
        yield f"{name}/{this}", digest_files(out, pattern)


# --- the demo, real slides ------------------------------------------------------------


def whole_demo(name: str) -> Found:
    """The demo, through Ray; with a light network for one epoch."""
    out = Work.folder / "demo"
    recipe = Recipe(
        model=Architecture("pan", "tu-test_resnet"),
        data=Data(crop=128, samples=64),
        schedule=Schedule(epochs=1),
        precision="float32",
    )
    demo(str(out), recipe=recipe, options=options_of())
    for kind in ("known", "new"):
        for path in sorted((out / kind / "slides").iterdir()):
            yield f"{name}/slides/{path.stem}", digest(path.read_bytes())
        paths = sorted((out / kind / "annotations").iterdir())
        yield (
            f"{name}/slides/{kind}-svg",
            digest(*(path.read_bytes() for path in paths)),
        )
    yield from of_dataset(f"{name}/dataset", out / "dataset")
    yield from of_model(f"{name}/model", out / "model")
    yield from of_run(f"{name}/run", out / "run")
    yield from of_report(f"{name}/report", out / "report")


def real_slides(name: str) -> Found:
    """Real slides as they are read, and masks of them at 2 microns per pixel."""
    for path in sorted((SHARED / "wsi").iterdir()):
        yield f"{name}/{path.name}", of_slide(path)
    model = write_model("coarse", mpp=2.0)
    said = Work.folder / "real.csv"
    said.write_text("slide,mpp\nTCGA-CR-7395-01A-01-TS1,0.5\n")
    options = options_of(mpp=str(said), outlines=True)
    run = infer(name, SHARED / "wsi", [model], options)
    yield from of_run(name, run)


def real_fields(name: str) -> Found:
    """A data set of real fields: JPEG, PNG and TIFF, outlines and masks."""
    folder = inputs.fields()
    medray(
        *("ingest", folder / "images", "--annotations", folder / "annotations"),
        *("--mpp", "0.5", "--out", folder / "dataset"),
    )
    yield from of_dataset(name, folder / "dataset")


def real_images(name: str) -> Found:
    """A data set of real images in class folders, and contours of real cells."""
    folder = inputs.malaria()
    medray(
        *("ingest", folder / "classes", "--side", "64", "--out", folder / "dataset"),
        *("--patients", "^(.*?)_?[Tt]hin", "--classes", "Uninfected,Parasitized"),
    )
    yield from of_dataset(name, folder / "dataset")
    paths = sorted((SHARED / "sipakmed" / "dat_contours_sample").iterdir())
    areas = [read_contour(str(p), height=2000, width=2500).wkt for p in paths]
    yield f"{name}/contours", digest(areas)


STEPS: dict[str, Callable[[str], Found]] = {
    "generated": generated,
    "annotations": annotations,
    "dataset": functools.partial(dataset, data=slide_data),
    "images": functools.partial(dataset, data=image_data),
    "cells": functools.partial(dataset, data=cell_data),
    **{
        f"options/{name}": functools.partial(option, **chosen)
        for name, chosen in OPTIONS.items()
    },
    "options/all": option_all,
    "ensemble/mean": functools.partial(ensemble, vote=False),
    "ensemble/vote": functools.partial(ensemble, vote=True),
    **{
        f"contract/{name}": functools.partial(contract, **chosen)
        for name, chosen in CONTRACTS.items()
    },
    "classifier": classifier,
    **{
        f"trained/{name}": functools.partial(segmenter, recipe=name)
        for name in SEGMENTERS
    },
    **{
        f"trained/{name}": functools.partial(image_classifier, recipe=name)
        for name in CLASSIFIERS
    },
    "trained/cervical": cell_classifier,
    "mil": slide_classifier,
    "report/images": image_reports,
    "report/slides": slide_report,
    "compare": comparison,
    "review": to_review,
    "convert": copies,
    "demo": whole_demo,
    "real/slides": real_slides,
    "real/fields": real_fields,
    "real/images": real_images,
}
"""By name; what each yields has names that begin with it."""
