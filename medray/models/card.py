"""The model card: what a person who is handed a model folder reads first, README.md.

Its head is YAML by Hugging Face's scheme of model cards, so that hubs list the model.
"""

from __future__ import annotations

from typing import Any

from medray.models.config import ModelConfig


def model_card(config: ModelConfig, metrics: dict[str, Any], digest: str) -> str:
    """Return the model card as Markdown.

    Args:
        config: What the model is.
        metrics: Scores on validation data; those that are missing are left out.
        digest: Of weights and configuration.
    """
    kind = "classification" if config.classifies else "segmentation"
    network = config.architecture
    head = (
        f"---\nlibrary_name: medray\npipeline_tag: image-{kind}\n"
        "tags: [pathology]\nmetrics: [f1]\n---\n\n"
        f"# {network.name} on {network.encoder}\n"
    )
    use = (
        "medray evaluate FOLDER --data DATASET --out REPORT   # images in class folders"
        if config.classifies
        else "medray infer SLIDES --model FOLDER --out RUN"
    )
    parts = [
        head,
        _table(_what_it_is(config, metrics, digest)),
        f"```bash\n{use}\n```\n",
        *_validation(metrics),
        *(f"- Warning: {warning}" for warning in metrics.get("warnings", ())),
        "Validation data chose the epoch, so these scores flatter the model. "
        "`medray evaluate` on data that it has not seen says how good it is; "
        "`seen.txt` lists what it has seen. `model.yaml` holds the recipe and the "
        "versions. Not a medical device.\n",
    ]
    return "\n".join(parts)


def _what_it_is(
    config: ModelConfig, metrics: dict[str, Any], digest: str
) -> dict[str, str]:
    side = config.window.size
    windows = f"{side} x {side} px, RGB"
    if not config.classifies:
        windows += f", one every {config.window.stride} px"
    if config.zscore:
        scaling = "each channel of an input by its own mean and deviation"
    else:
        mean, std = (
            ", ".join(f"{value:g}" for value in values)
            for values in (config.mean, config.std)
        )
        scaling = f"mean {mean}; deviation {std} (of pixels scaled to 0..1)"
    made = config.provenance
    start = made.get("recipe", {}).get("weights")
    found = {
        "classes": ", ".join(config.classes.names),
        "input": windows,
        "resolution": f"{config.mpp:g} um per pixel" if config.mpp else "level 0",
        "stain": config.stain,
        "scaling": scaling,
        "digest": digest,
    }
    if "parameters" in metrics:
        found["parameters"] = f"{metrics['parameters'] / 1e6:.2f} million"
    if "digest" in made:
        found["training data"] = f"dataset {made['digest']}"
        found["first weights"] = (
            "random" if start is None else str(start).rsplit("/", 1)[-1]
        )
    if "epochs" in made and "epoch" in metrics:
        found["epochs"] = f"{made['epochs']}; taken: {metrics['epoch'] + 1}"
    return found


def _validation(metrics: dict[str, Any]) -> list[str]:
    if metrics.get("f1") is None:
        return []
    whole = {
        name: f"{metrics[key]:.4f}"
        for key, name in (("f1", "F1"), ("accuracy", "accuracy"), ("iou", "IoU"))
        if metrics.get(key) is not None
    }
    scores = ("f1", "precision", "recall", "specificity")
    lines = ["## On validation data\n", _table(whole)]
    if rows := metrics.get("per_class"):
        lines.append(
            "| class | F1 | precision | recall | specificity |\n" + "| --- " * 5
        )
        lines[-1] += "|\n" + "".join(
            f"| {row['class']} | {' | '.join(_score(row.get(s)) for s in scores)} |\n"
            for row in rows
        )
    return lines


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(rows: dict[str, str]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n| --- | --- |\n{lines}"
