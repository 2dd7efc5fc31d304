"""Any history of a run ends in the masks that a plain loop makes of the same slides.

A state machine adds, replaces and removes slides, runs, crashes, verifies, damages and
collects in any order. Here every step is done in this process, with crashes at any
region; tests/kill/execution/test_faults.py and benchmarks/robustness/chaos.py kill real processes, and
`test_a_history_on_ray` below does a short history on Ray.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import serial
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.evaluation.diff_runs import diff
from medray.inference.leftovers import collect
from medray.inference.run import Options
from medray.inference.verify_run import verify
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage.ledger import Ledger

OPTIONS = Options(region=512, prediction=Prediction(precision="float32"), outlines=True)
NAMES = ("a", "b", "c")


class History(RuleBasedStateMachine):
    """A folder of slides and a run over it."""

    model: Path
    scenes: Path  # where slides that were drawn are kept
    masters: Path  # where their masks are kept, made by one plain run each

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.folder / "run"
        self.inbox = self.folder / "inbox"
        self.inbox.mkdir()
        self.holds: dict[str, int] = {}  # the scene of each slide
        self.damaged: set[str] = set()  # the slide is still the one of its mask
        self.unsure: set[str] = set()  # damaged, then replaced: made again or not yet
        self.complete = False  # whether the run has all that the inbox has

    def infer(self, slides: Path, out: Path, crash_after: int = -1):
        return serial.infer(
            slides, self.predictor(), self.model, out, OPTIONS, crash_after
        )

    @classmethod
    def predictor(cls) -> Predictor:
        if not hasattr(cls, "_predictor"):
            cls._predictor = Predictor.from_folders(
                [str(cls.model)], OPTIONS.prediction
            )
        return cls._predictor

    def expected(self, name: str, scene: int) -> dict[str, bytes]:
        """The files of a slide's mask, made by a run over that slide alone."""
        out = self.masters / f"{name}{scene}"
        if not out.exists():
            alone = self.masters / f"slides{name}{scene}"
            alone.mkdir()
            shutil.copy(self.drawn(scene), alone / f"{name}.tif")
            assert History.infer(self, alone, out).failed == {}
        return outputs(out, name)

    def drawn(self, scene: int) -> Path:
        path = self.scenes / f"{scene}.tif"
        if not path.exists():
            size = {"height": 560 + 20 * scene, "width": 1040}
            write_slide(
                self.scenes, f"{scene}", draw_scene(scene, **size), layout="pyramid"
            )
        return path

    @initialize()
    def first(self) -> None:
        self.put("a", 0)

    @rule(name=st.sampled_from(NAMES), scene=st.integers(0, 3))
    def put(self, name: str, scene: int) -> None:
        """Add a slide, replace one by another, or touch it."""
        shutil.copy(self.drawn(scene), self.inbox / f"{name}.tif")
        if self.holds.get(name) != scene:
            self.complete = False
            if name in self.damaged:
                self.damaged.remove(name)
                self.unsure.add(name)
        self.holds[name] = scene

    @precondition(lambda self: len(self.holds) > 1)
    @rule(name=st.sampled_from(NAMES))
    def take_away(self, name: str) -> None:
        if name in self.holds:
            del self.holds[name]
            (self.inbox / f"{name}.tif").unlink()

    @rule(regions=st.integers(0, 8))
    def crash(self, regions: int) -> None:
        try:
            self.infer(self.inbox, self.out, crash_after=regions)
        except serial.CrashError:
            return
        self.check_complete()

    @rule()
    def run(self) -> None:
        commit = self.infer(self.inbox, self.out)
        assert commit.failed == {}
        if self.complete and not self.damaged | self.unsure:
            assert (commit.done, commit.regions) == (0, 0)
        self.check_complete()

    def check_complete(self) -> None:
        self.complete = True
        ledger = Ledger(str(self.out))
        done = {s for s, row in ledger.slides.items() if row["status"] == "done"}
        assert set(self.holds) <= done
        for name, scene in self.holds.items():
            if name not in self.damaged | self.unsure:
                assert outputs(self.out, name) == self.expected(name, scene)

    @precondition(lambda self: self.complete)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        whole = sorted(set(self.holds) - self.damaged - self.unsure)
        if not whole:
            return
        name = data.draw(st.sampled_from(whole))
        paths = sorted(p for p in files_of(self.out, name) if p.stat().st_size > 4)
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        content = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        else:
            content[len(content) // 2] ^= 1 + data.draw(st.integers(0, 254))
            path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
        self.damaged.add(name)

    @precondition(lambda self: (self.out / "journal").exists())
    @rule(name=st.sampled_from(NAMES))
    def lose(self, name: str) -> None:
        """Somebody removes a mask; of a slide under way that shall not matter."""
        shutil.rmtree(self.out / f"masks/{name}.ome.zarr", ignore_errors=True)
        row = Ledger(str(self.out)).slides.get(name)
        if row is not None and row["status"] == "done":
            self.damaged.discard(name)
            self.unsure.add(name)

    @precondition(lambda self: (self.out / "run.yaml").exists())
    @rule()
    def check_and_repair(self) -> None:
        found = verify(str(self.out))
        held = set(self.holds)
        assert self.damaged & held <= set(found.failed)
        if (self.damaged | self.unsure) & held:
            assert self.infer(self.inbox, self.out).failed == {}
            self.damaged -= held
            self.unsure -= held
            self.check_complete()
        if self.complete and not self.damaged | self.unsure:
            self.check_complete()
            again = verify(str(self.out))
            assert not set(again.failed) & set(self.holds)

    @precondition(lambda self: (self.out / "run.yaml").exists())
    @rule()
    def sweep(self) -> None:
        collect(str(self.out))
        assert collect(str(self.out)).removed == []
        if self.complete:
            assert diff(str(self.out), str(self.out)).changed == {} or (
                self.damaged | self.unsure
            )

    @invariant()
    def nothing_is_half_done(self) -> None:
        """What the ledger calls done is whole, whatever happened since."""
        if not (self.out / "slides.parquet").exists() or (self.damaged | self.unsure):
            return
        for name, row in Ledger(str(self.out)).slides.items():
            if row["status"] == "done":
                assert (self.out / f"masks/{name}.ome.zarr/zarr.json").exists()
                assert (self.out / f"commits/{name}.json").exists()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def files_of(out: Path, name: str) -> list[Path]:
    found = [*out.glob(f"masks/{name}.ome.zarr/**/*"), out / f"outlines/{name}.geojson"]
    return [path for path in found if path.is_file()]


def outputs(out: Path, name: str) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in files_of(out, name)}


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param(2, 12, id="short"),
        pytest.param(2, 25, id="long", marks=pytest.mark.timeout(2400)),
    ],
)
def test_any_history_ends_in_the_same_masks(
    model: Path, tmp_path_factory: pytest.TempPathFactory, examples: int, steps: int
) -> None:
    class Machine(History):
        pass

    Machine.model = model
    Machine.scenes = tmp_path_factory.mktemp("scenes")
    Machine.masters = tmp_path_factory.mktemp("masters")
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.generate, Phase.explicit],
            suppress_health_check=list(HealthCheck),
            # In CI the same histories each time; by hand others, which find more.
            derandomize=steps < 25 or "CI" in os.environ,
        ),
    )


@pytest.mark.timeout(2400)
def test_a_history_on_ray(
    model: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> None:
    """The same machine with every run on Ray; masters are still the plain loop's."""
    from medray.inference.infer_run import infer

    class Machine(History):
        def infer(self, slides: Path, out: Path, crash_after: int = -1):
            if crash_after >= 0:  # a crash is the plain loop's; Ray takes over from it
                return super().infer(slides, out, crash_after)
            return infer([str(slides)], model=str(model), out=str(out), options=OPTIONS)

    Machine.model = model
    Machine.scenes = tmp_path_factory.mktemp("scenes")
    Machine.masters = tmp_path_factory.mktemp("masters")
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=2,  # the first is always the simplest: it runs, and looks
            stateful_step_count=8,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize="CI" in os.environ,
        ),
    )
