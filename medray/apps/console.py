"""The results of commands in words, for people; the same values as --json gives.

One file, because each result is a function of a few lines, chosen by `as_text`.
"""

from __future__ import annotations

from typing import Any


def as_text(command: str, values: dict[str, Any]) -> str:
    """Tell a result: where things are, and last how many slides failed."""
    lines = []
    if "budget_bytes" in values:
        return _estimate_text(values)
    if "checks" in values:
        return "\n".join(
            f"{'ok    ' if c['passed'] else 'FAILED'} {c['name']:18} {c['asked']}"
            + ("" if c["passed"] else f": {c['found']}")
            for c in values["checks"]
        )
    if "verified" in values:
        return _verified_text(values)
    if "removed" in values:
        verb = "would remove" if values["dry_run"] else "removed"
        lines = [f"{verb}  {path}" for path in values["removed"]]
        size = f"{values['bytes'] / 2**20:.1f} MiB"
        return "\n".join([*lines, f"gc: {verb} {len(lines)} leftovers, {size}"])
    if command == "check":
        return _check_text(values)
    if command == "recipes":
        return _recipes_text(values)
    if command == "view":
        return _viewing_text(values)
    if "speed_up" in values:
        return _export_text(values)
    if "findings" in values:
        return _diagnosis_text(values)
    if command == "submit":
        return _job_text(values)
    if "handed_on" in values:
        return _night_text(values)
    if "squares" in values:
        return _review_text(values)
    if "worse" in values:
        return _comparison_text(values)
    if "agreement" in values:
        return _difference_text(values)
    if "f1" in values:
        score = (
            "none (no foreground)" if values["f1"] is None else f"{values['f1']:.4f}"
        )
        interval = values.get("interval")
        span = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        lines.append(f"F1      {score}{span}")
    if "calibration" in values:
        lines += _images_text(values)
    if "report" in values:
        lines.append(f"report  {values['report']}")
    lines.append(f"out     {values['out']}")
    if "trained" in values:
        state = "trained" if values["trained"] else "was there already"
        lines.append(f"{command}: {state}, {values['epochs']} epochs")
    failed = values.get("failed", {})
    if "best" in values:
        best = ", ".join(f"{key}={value}" for key, value in values["best"].items())
        lines.append(f"best    {best}")
        lines.append(
            f"{command}: {values['trials']} trials, {len(failed)} failed, "
            f"{values['seconds']:.1f} s"
        )
    if "copies" in values:
        lines.append(
            f"{command}: {values['images']} images done, {values['skipped']} done "
            f"before, {values['copies']} copies left out, {len(failed)} failed, "
            f"{values['seconds']:.1f} s"
        )
    elif "unseen" in values:
        lines.append(
            f"{command}: {values['unseen']} slides evaluated, {values['seen']} left "
            f"out that the model has seen, {len(failed)} failed"
        )
    elif "images" in values:
        lines.append(
            f"{command}: {values['images']} images evaluated, {len(failed)} sheets "
            f"failed"
        )
    elif "done" in values:
        lines.append(
            f"{command}: {values['done']} slides done, {values['skipped']} done "
            f"before, {len(failed)} failed, {values['seconds']:.1f} s"
        )
    elif "explained" in values:
        lines += [f"failed  {name}: {why}" for name, why in failed.items()]
        lines.append(
            f"{command}: {values['explained']} images explained, {len(failed)} failed"
        )
    elif "evaluated" in values:
        lines.append(
            f"{command}: {values['evaluated']} slides evaluated, {len(failed)} failed"
        )
    return "\n".join(lines)


def _check_text(values: dict[str, Any]) -> str:
    head = ("", "slide", "height x width", "levels", "um", "format", "annotation")
    table = [(*head, "areas"), *map(_check_cells, values["slides"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    lines = rows[:1]
    for line, row in zip(rows[1:], values["slides"], strict=True):
        said = row["message"] or row["note"]
        lines += [line, *([f"         {said}"] if said else [])]
    lines += [f"not used  {uri}" for uri in values["unused"]]
    lines += [f"without   {slide}" for slide in values["bare"]]
    if values["page"]:
        lines += [f"page      {values['page']}", f"out       {values['out']}"]
    lines.append(
        f"check: {len(values['slides'])} slides, {len(values['failed'])} refused, "
        f"{len(values['bare'])} without annotation; {len(values['unused'])} "
        f"annotations not used"
    )
    return "\n".join(lines)


def _check_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a slide's line; a dash is what is not known."""
    size = f"{row['height']} x {row['width']}" if row["height"] else "-"
    mpp = "-" if row["mpp"] is None else f"{row['mpp']:.4g} ({row['mpp_from']})"
    areas = []
    for key, count in row.items():
        name = key.removeprefix("areas_")
        if name != key and count:
            mm2 = row[f"mm2_{name}"]
            size_mm2 = "" if mm2 is None else f" {mm2:.3g} mm2"
            areas.append(f"{name} {count}{size_mm2} {100 * row[f'share_{name}']:.3g} %")
    return (
        row["status"],
        row["slide"],
        size,
        str(row["levels"] or "-"),
        mpp,
        row["format"] or "-",
        row["annotation"].rpartition("/")[2] or "-",
        ", ".join(areas) or "-",
    )


def _recipes_text(values: dict[str, Any]) -> str:
    lines: list[str] = []
    width = max(len(row["name"]) for row in values["recipes"])
    for row in values["recipes"]:
        if row["command"] not in lines:
            lines += ["", row["command"]]
        lines.append(f"  {row['name']:{width}}  {row['about']}")
    return "\n".join([*lines[1:], "", f"folder  {values['folder']}"])


def _job_text(values: dict[str, Any]) -> str:
    said = f"submit: {values['job']} {values['status']}, exit code {values['code']}"
    if values["lost"]:
        said += f"; submitted again {values['lost']} times, for the head was lost"
    return said if values["status"] == "SUCCEEDED" else f"{said}: {values['message']}"


def _viewing_text(values: dict[str, Any]) -> str:
    lines = [f"run     {values['run']} ({values['slides']} slides)"]
    for name in ("report", "truth"):
        said = values[name] or f"none; give --{name} to see it"
        lines.append(f"{name:8}{said}")
    return "\n".join([*lines, f"open    {values['url']}", "view: Ctrl-C ends it"])


def _images_text(values: dict[str, Any]) -> list[str]:
    found, beside = values["calibration"], values["beside"]
    if "temperature" in found:
        said = f"{found['error_scaled']:.4f} at temperature {found['temperature']:.2f}"
    else:
        said = f"no temperature: {found['why']}"
    lines = [f"calibration error  {found['error']:.4f}; {said}"]
    if beside:
        lines.append(
            f"beside {beside['report']}  accuracy {beside['accuracy']:.4f} and "
            f"{beside['other_accuracy']:.4f} of {beside['images']} images; only this "
            f"right {beside['only_this']}, only that {beside['only_other']}; McNemar "
            f"p = {beside['p_value']:.3g}"
        )
    return lines


def _verified_text(values: dict[str, Any]) -> str:
    failed = values["failed"]
    lines = [f"damaged  {slide}: {why}" for slide, why in failed.items()]
    lines.append(
        f"verify: {values['verified']} slides are as they were committed, "
        f"{len(failed)} damaged, {values['files']} files read"
    )
    if failed and values["noted"]:
        lines.append("run the same `medray infer` again to repair them")
    return "\n".join(lines)


def _export_text(values: dict[str, Any]) -> str:
    before, after = (values[name] / 2**20 for name in ("model_bytes", "file_bytes"))
    lines = [
        f"compared  on {values['compared']} windows of {values['source']}",
        f"classes   the same in {values['agreement']:.3%}; probabilities differ by at "
        f"most {values['largest_difference']:.4f}",
        f"size      {after:.1f} MiB, the model's weights {before:.1f} MiB",
        f"speed     {values['speed_up']:.2f} times the model's",
    ]
    if values["f1"] is not None and values["model_f1"] is not None:
        lines.append(
            f"F1        {values['f1']:.4f}, the model's {values['model_f1']:.4f}"
        )
    return "\n".join([*lines, f"out       {values['out']}"])


def _diagnosis_text(values: dict[str, Any]) -> str:
    findings = values["findings"]
    lines = []
    for one in findings:
        lines.append(f"{one['status']:4}  {one['name']}: {one['found']}")
        lines += [f"      {one['mend']}"] if one["mend"] else []
    failed = sum(one["status"] == "FAIL" for one in findings)
    warned = sum(one["status"] == "WARN" for one in findings)
    lines.append(f"doctor: {len(findings)} checks, {failed} failed, {warned} warnings")
    return "\n".join(lines)


def _night_text(values: dict[str, Any]) -> str:
    handed_on, given_up = values["handed_on"], values["given_up"]
    lines = [f"left out  {name}: {why}" for name, why in values["left_out"].items()]
    lines += [f"failed    {name}: {why}" for name, why in handed_on.items()]
    lines += [f"given up  {name}: {why}" for name, why in given_up.items()]
    lines += [f"drift     {words}" for words in values["flagged"]]
    lines.append(f"summary   {values['summary']}")
    before = ", committed before" if values["committed_before"] else ""
    lines.append(
        f"nightly: night {values['night']}{before}: {values['done']} slides done, "
        f"{len(handed_on)} failed and handed on, {len(given_up)} given up, "
        f"{len(values['left_out'])} left out, {values['copies']} copies, "
        f"{values['replaced']} replaced"
    )
    return "\n".join(lines)


def _difference_text(values: dict[str, Any]) -> str:
    lines = [
        f"cannot   {slide}: {why}" for slide, why in values["not_compared"].items()
    ]
    for slide, regions in values["changed"].items():
        for (y, x, height, width), pixels in regions:
            where = f"y={y} x={x} {height} x {width}"
            lines.append(f"changed  {slide} {where}: {pixels} pixels")
    for row in values["agreement"]:
        f1 = "none" if row["f1"] is None else f"{row['f1']:.5f}"
        pixels = f"{row['px']} and {row['other_px']} pixels"
        lines.append(f"class    {row['class']}: F1 {f1}, {pixels}")
    lines.append(
        f"diff: {values['compared']} slides compared, {len(values['changed'])} differ"
    )
    return "\n".join(lines)


def _review_text(values: dict[str, Any]) -> str:
    lines = [f"cannot  {slide}: {why}" for slide, why in values["failed"].items()]
    lines += [
        f"{count:6}  {values['out']}/{slide}.geojson"
        for slide, count in values["slides"].items()
    ]
    lines.append(
        f"review: {values['squares']} squares of {len(values['slides'])} slides, "
        f"{len(values['failed'])} could not be looked at"
    )
    return "\n".join(lines)


def _comparison_text(values: dict[str, Any]) -> str:
    lines = [f"cannot      {slide}: {why}" for slide, why in values["failed"].items()]
    if values["difference"] is not None:
        interval = values["interval"]
        span = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
        p_value = f", p = {values['p_value']:.3g}" if interval else ""
        lines += [
            f"F1          {values['f1']:.4f} and {values['other_f1']:.4f}",
            f"difference  {values['difference']:+.4f}{span}{p_value}",
        ]
    lines += [f"worse       {slide}" for slide in values["worse"][:10]]
    lines += [
        f"report      {values['report']}",
        f"compare: {values['compared']} slides compared, {values['changed']} differ, "
        f"{values['scored']} have a truth: {len(values['better'])} better, "
        f"{len(values['worse'])} worse; {len(values['failed'])} could not be compared",
    ]
    return "\n".join(lines)


def _estimate_text(values: dict[str, Any]) -> str:
    gib = {k: v / 2**30 for k, v in values.items() if k.endswith("_bytes")}
    least, most = values["seconds"]
    lines = [
        f"slides   {values['slides']}, {values['sampled']} of them looked at, "
        f"{len(values['failed'])} cannot be planned",
        f"work     {values['regions']} regions, {values['windows']} windows at "
        f"{values['window_s'] * 1e3:.1f} ms on each of "
        f"{values['gpu_workers']} GPU workers",
        f"time     {least:.0f} to {most:.0f} s",
        f"memory   at most {gib['host_bytes']:.1f} GiB a node, "
        f"{gib['store_bytes']:.1f} GiB of it the object store; Ray has "
        f"{gib['budget_bytes']:.1f} GiB",
        f"device   {gib['device_bytes']:.1f} GiB" if gib["device_bytes"] else "",
        f"copies   {gib['copied_bytes']:.2f} GiB of slides whole from their store, at "
        f"most {gib['cache_bytes']:.1f} GiB of them on a node at once"
        if gib["copied_bytes"]
        else "",
        f"output   at most {gib['output_bytes']:.2f} GiB, usually a hundredth",
    ]
    if values["cost"]:
        low, high = values["cost"]
        per = [cost / values["slides"] for cost in (low, high)]
        lines.append(
            f"cost     {low:.2f} to {high:.2f}, {per[0]:.4f} to {per[1]:.4f} a slide"
        )
    lines += [f"failed   {name}: {why}" for name, why in values["failed"].items()]
    return "\n".join(line for line in lines if line)
