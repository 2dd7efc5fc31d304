"""The rows that benchmarks of how good a recipe is put into docs/results.md."""

import numpy as np

from benchmarks.quality.segmentation import pooled, row_of


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
