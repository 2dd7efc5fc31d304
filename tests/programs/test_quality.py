"""The rows that benchmarks of how good a recipe is put into docs/results.md."""

from collections import Counter

import numpy as np

from benchmarks.quality.ablations import split_of, untested
from benchmarks.quality.classification import (
    Image,
    predicted,
    splits_of,
    without_doubted,
)
from benchmarks.quality.segmentation import pooled, row_of
from medray.evaluation.image_metrics import Predicted


def field(hit: int, missed: int, wrong: int) -> dict:
    counts = np.array([[100, wrong], [missed, hit]])
    return {"counts": counts.tolist(), "small": [1, 1, hit, hit + missed + wrong]}


def result(fields: dict[str, dict], digest: str | None = None) -> dict:
    kept = {"digest": digest} if digest else {}
    return {"fields": {"": fields}, "seconds": 60.4, "parameters": 7} | kept


def row(results: list[dict]) -> dict:
    line = {"title": "nuclei", "overrides": ["weights=FILE"]}
    return row_of(line | pooled(results, ("background", "nucleus")), results, "")


def test_a_fold_has_its_own_f1_beside_that_of_all_pixels():
    first = result({"a": field(8, 0, 0), "b": field(8, 0, 0)}, "sha256:0123456789")
    second = result({"c": field(5, 5, 5)}, "sha256:abcdef0123")
    found = row([first, second])
    assert found["F1 by fold"] == "1.000, 0.500"
    assert str(found["F1 [95 %]"]).startswith("0.808 [")  # 2 * 21 / (2 * 21 + 10)
    assert found["precision"] == found["recall"] == "0.808"
    assert found["weights"] == "01234567, abcdef01"
    assert found["fields"] == 3
    assert found["digests"] == ["sha256:0123456789", "sha256:abcdef0123"]


def test_a_fold_that_was_kept_without_its_digest_still_counts():
    older = result({"a": field(8, 0, 0)})
    newer = result({"b": field(8, 0, 0)}, "sha256:0123456789")
    found = row([older, newer])
    assert found["weights"] == "01234567"
    assert found["fields"] == 2


def test_an_ablation_sees_no_image_of_a_test_and_divides_no_patient():
    images = [
        Image(f"{kind}/{patient}_{k}", kind, f"{kind}/{patient}", split)
        for kind in ("NORMAL", "PNEUMONIA")
        for patient in range(60)
        for k in range(3)
        for split in [("test" if patient % 6 == 0 and k else "train")]
    ]
    for name in ("sipakmed-full", "xray"):
        left = untested(name, images)
        (first, *_) = splits_of(name, images, 5, many=True)
        tests = {image.patient for image in images if first.get(image.name) == "test"}
        assert tests
        assert not tests & {image.patient for image in left}
        split = split_of(left)
        assert set(split) == {image.name for image in left}
        parts = {(image.patient, split[image.name]) for image in left}
        assert len(parts) == len({patient for patient, _ in parts})
        shares = Counter(split.values())
        assert shares["train"] > shares["test"] > shares["val"] > 0


def test_a_label_is_doubted_only_where_another_class_is_nearly_certain():
    def of(truth: int, second: float) -> Predicted:
        row = {"image": "a", "patient": "p", "truth": truth}
        shares = [1 - second, second]
        return predicted(
            row | {"predicted": int(second > 0.5), "probabilities": shares}
        )

    rows = [of(0, 0.96), of(0, 0.9), of(1, 0.99), of(1, 0.2)]
    assert without_doubted(rows) == {"doubted": 1, "undoubted": 1 / 3}
    assert without_doubted(rows[:1]) == {"doubted": 1, "undoubted": None}
