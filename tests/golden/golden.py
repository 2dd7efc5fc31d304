"""Golden digests: is what medray makes of fixed inputs still the same?

    make golden             # compare with digests.json; exit code 1 where it differs
    make golden-update      # keep what there is now; the commit says why it changed
    python tests/golden/golden.py --only 'options/*' --work /tmp/golden

What is made is in steps.py, of what in inputs.py, what counts of it in digests.py;
docs/checks.md says what is covered.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared" / "data"
CPUS = 2
"""That Ray counts, whatever the machine has: numbers of threads follow from it."""

PINNED = {
    # One arithmetic on every CPU with AVX2: wider registers sum in another order.
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # its convolutions
    "MKL_CBWR": "COMPATIBLE",  # its matrix products; other modes are for Intel's CPUs
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Haswell",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
    # Sums over a batch are shared among threads.
    "OMP_NUM_THREADS": str(CPUS),
    "MKL_NUM_THREADS": str(CPUS),
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # for machines with other work
    "RAY_AUTH_MODE": "disabled",
    # Ray's processes have imported what the next step needs.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
"""Environment of this process and of Ray's, set before anything else is imported."""


def start(work: Path) -> None:
    """Pin what decides the arithmetic, and start Ray."""
    os.environ.update(PINNED)
    os.environ.pop("RAY_ADDRESS", None)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    import inputs
    import ray
    import torch

    inputs.Work.folder = work
    torch.set_num_threads(CPUS)
    ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=0,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )


def chosen_steps(
    steps: Mapping[str, object], kept: Mapping[str, str], only: str
) -> list[str]:
    """Choose the steps that make something whose name matches."""
    return [
        step
        for step in steps
        if any(
            fnmatch.fnmatch(name, only)
            for name in (step, f"{step}/", *kept)
            if belongs(name, step)
        )
    ]


def belongs(name: str, step: str) -> bool:
    """Return whether a step makes what has this name."""
    return name == step or name.startswith(f"{step}/")


def make_all(names: list[str], log: TextIO) -> tuple[dict[str, str], dict[str, str]]:
    """Make what the steps say.

    Returns:
        Digests by name, and by step why there is none.
    """
    from steps import STEPS

    found: dict[str, str] = {}
    absent: dict[str, str] = {}
    for step in names:
        if step.startswith("real/") and not SHARED.is_dir():
            absent[step] = "not made: the real slides are not beside this checkout"
            continue
        begun = time.monotonic()
        try:
            with contextlib.redirect_stderr(log):
                found.update(STEPS[step](step))
        except Exception as error:
            traceback.print_exc(file=log)
            absent[step] = f"failed: {' '.join(f'{error}'.split())[:200]}"
        print(f"{step:32} {time.monotonic() - begun:6.1f} s", flush=True)
    return found, absent


def differences(
    kept: Mapping[str, str], found: Mapping[str, str], absent: Mapping[str, str]
) -> list[tuple[str, str, str, str]]:
    """Return one row per name that differs: name, kind, kept, found."""
    rows = []
    for name in sorted(kept.keys() | found.keys()):
        before, now = kept.get(name, ""), found.get(name, "")
        if before == now:
            continue
        what = "differs" if before and now else "new" if now else "is gone"
        if any(belongs(name, step) for step in absent) and not now:
            continue  # said once for the step
        rows.append((name, what, before, now))
    return rows


def main() -> int:
    """Compare or keep the digests; 1 where they differ or something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="of their names")
    parser.add_argument("--work", type=Path, help="folder to make (a temporary one)")
    parser.add_argument("--kept", type=Path, default=HERE / "digests.json")
    parser.add_argument("--update", action="store_true", help="keep what there is now")
    args = parser.parse_args()
    kept = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    with contextlib.ExitStack() as stack:
        work = args.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-"))
        )
        work.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((work / "golden.log").open("w"))
        begun = time.monotonic()
        start(work)
        from steps import STEPS

        names = chosen_steps(STEPS, kept, args.only)
        found, absent = make_all(names, log)
    # What was not asked for counts as neither equal nor gone.
    asked = {n: d for n, d in kept.items() if any(belongs(n, step) for step in names)}
    asked |= {n: d for n, d in kept.items() if not any(belongs(n, s) for s in STEPS)}
    rows = differences(asked, found, absent)
    for name, what, before, now in rows:
        print(f"{name:48} {what:8} {before:16} {now:16}")
    for step, why in absent.items():
        print(f"{step:48} {why}")
    equal = sum(asked.get(name) == one for name, one in found.items())
    seconds = time.monotonic() - begun
    print(
        f"{equal} equal, {len(rows)} not, {len(absent)} steps not made, {seconds:.0f} s"
    )
    if args.update:
        gone = {name for name, what, *_ in rows if what == "is gone"}
        now = {n: d for n, d in kept.items() if n not in gone} | found
        args.kept.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return int(any(why.startswith("failed") for why in absent.values()))
    return int(bool(rows) or any(why.startswith("failed") for why in absent.values()))


if __name__ == "__main__":
    raise SystemExit(main())
