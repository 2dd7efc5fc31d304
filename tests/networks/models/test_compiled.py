"""Compiled networks: equal to eager ones, made once, and never half made."""

import ctypes
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medray.classes import Classes
from medray.errors import CompileError, ConfigError
from medray.geometry import Windows
from medray.models.compiled import Compiled
from medray.models.compiler import cuda_toolkit
from medray.models.config import Architecture, ModelConfig, Prediction
from medray.models.exported import Exported
from medray.models.folder import _build
from medray.models.network import Network, chooses_to_compile, folded
from medray.models.predict import Predictor

CPU = torch.device("cpu")
SHAPE = (2, 3, 64, 64)


class Small(nn.Module):
    """Quickly compiled; no two of its operations are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(inputs))))


class Deciding(nn.Module):
    """Goes one way or another by what it sees, which no export can follow."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if float(inputs.sum()) > 0 else -inputs


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def images(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def compiled(**how: Any) -> Compiled:
    return Compiled(small(), SHAPE, CPU, torch.float32, name="small", **how)


def run(network: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(inputs)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the small network."""
    folder = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRAY_COMPILE_CACHE", str(folder))
        compiled()
    return folder


@pytest.fixture
def own(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in use."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(folder))
    return folder


def entry_of(folder: Path) -> Path:
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    return entry


def library_of(folder: Path) -> Path:
    (library,) = entry_of(folder).rglob("*.so")
    return library


def test_it_is_the_network(own: Path) -> None:
    network, inputs = small(), images()
    found = run(compiled(), inputs)
    torch.testing.assert_close(found, run(network, inputs))
    assert network.first.weight.requires_grad  # which is left as it was
    assert {path.suffix for path in own.iterdir()} == {"", ".lock"}


def test_it_takes_batches_of_its_shape_or_shorter_ones(own: Path) -> None:
    made, inputs = compiled(), images()
    assert torch.equal(run(made, inputs[:1]), run(made, inputs)[:1])
    for shape in ((3, 3, 64, 64), (2, 3, 32, 64)):
        with pytest.raises(ValueError, match=r"compiled for \(2, 3, 64, 64\)"):
            made(images(shape))


def test_a_package_that_is_there_is_loaded(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    monkeypatch.setenv("CXX", "no-compiler")  # it would be missed
    compiled()
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


def test_another_network_or_dtype_has_another_package(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    other = small()
    other.last.weight.data[0, 0] += 1e-3
    for network, shape, dtype in (
        (other, SHAPE, torch.float32),
        (small(), (1, 3, 64, 64), torch.float32),
        (small(), SHAPE, torch.bfloat16),
    ):
        with pytest.raises(CompileError, match="no C\\+\\+ compiler no-compiler"):
            Compiled(network, shape, CPU, dtype, name="small")


@pytest.mark.parametrize("how", ["cut", "flip", "remove", "emptied"])
def test_a_broken_package_is_made_again(own: Path, how: str) -> None:
    inputs = images()
    wanted = run(compiled(), inputs)
    library = library_of(own)
    data = bytearray(library.read_bytes())
    library.unlink()
    if how == "cut":
        library.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
    elif how == "emptied":
        shutil.rmtree(entry_of(own))
        (own / "nothing").mkdir()
        (own / "nothing").rmdir()
    assert torch.equal(run(compiled(), inputs), wanted)
    assert library_of(own).stat().st_size > 0


def test_a_package_made_elsewhere_gives_the_same_bits(
    own: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = images()
    one = run(compiled(), inputs)
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path / "other"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # of who makes it
    try:
        made = compiled()
    finally:
        torch.set_num_threads(threads)
    other = run(made, inputs)
    assert entry_of(tmp_path / "other").name == entry_of(cache).name
    assert torch.equal(one, other)


def test_what_is_left_of_a_compiler_is_removed(own: Path) -> None:
    entry = entry_of(own)
    shutil.rmtree(entry)
    left = entry.with_suffix(".new-x")
    left.mkdir()
    (left / "network.pt2").write_bytes(b"half")
    compiled()
    assert entry.is_dir()
    assert not left.exists()


def test_a_network_that_cannot_be_exported_is_named(own: Path) -> None:
    with pytest.raises(CompileError, match="cannot follow deciding.*--compile off"):
        Compiled(Deciding().eval(), SHAPE, CPU, torch.float32, name="deciding")


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompileError, match="MEDRAY_COMPILE_CACHE .* --compile off"):
        compiled()


def test_a_disk_that_is_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may become larger, of a compiler's neither: as on a full disk."""
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CompileError, match="free space .* --compile off"):
            compiled()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    compiled()  # with room it is made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount file systems")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_file_system_that_is_full_or_read_only_is_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(disk))
    with pytest.raises(CompileError, match="No space left.*free space"):
        compiled()
    assert {path.suffix for path in disk.iterdir()} == {".lock"}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CompileError, match="Read-only.*MEDRAY_COMPILE_CACHE"):
        compiled()
    subprocess.run(["mount", "-o", "remount,rw,size=50m", str(disk)], check=True)
    compiled()


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_compiled import compiled, images, run
print(run(compiled(), images()).sum().item())
"""


def start() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(folder: Path, pattern: str) -> Path:
    for _ in range(600):
        if found := list(folder.glob(pattern)):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no {pattern}")


def test_one_process_compiles_and_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is without a compiler: had it not waited, it would have failed."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(folder))
    first = start()
    wait_for(folder, "*.new-*")
    monkeypatch.setenv("CXX", "no-compiler")
    second = start()
    said = [process.communicate(timeout=200)[0] for process in (first, second)]
    assert said[0] == said[1] != ""


def test_a_compiler_that_is_killed_costs_itself_alone(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(compiled(), images())
    folder = tmp_path / "killed"
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(folder))
    process = start()
    new = wait_for(folder, "*.new-*/*/**/*.cpp").relative_to(folder).parts[0]
    process.kill()
    process.communicate()
    assert (folder / new).exists()
    assert torch.equal(run(compiled(), images()), wanted)
    assert {path.suffix for path in folder.iterdir()} == {"", ".lock"}


# --- networks -------------------------------------------------------------------------

KINDS = [
    ("unet", "resnet18", 64),
    ("unet", "tu-mobilenetv3_small_050", 64),
    ("deeplabv3plus", "resnet34", 64),
    ("segformer", "mit_b0", 64),
    ("upernet", "resnet34", 64),
    ("fcn8s", "vgg16", 64),
    ("highres_unet", "tu-mobilenetv3_large_100", 64),
    ("pan", "tu-test_resnet", 128),
    ("classifier", "regnetx_002", 64),
    ("classifier", "vit_tiny_patch16_224", 224),
]


def config_of(name: str, encoder: str, side: int) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture(name, encoder),
        classes=Classes(("background", "a", "b")),
        window=Windows(side, side),
        mpp=None,
    )


def network_of(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return _build(config.architecture, 3).eval()


@pytest.mark.parametrize(("name", "encoder", "side"), KINDS)
def test_each_kind_of_network_can_be_compiled(
    name: str,
    encoder: str,
    side: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path))
    config = config_of(name, encoder, side)
    generator = torch.Generator().manual_seed(2)
    shape = (2, side, side, 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    eager = run(Network(network_of(config), config, CPU, torch.float32), pixels)
    made = Network(network_of(config), config, CPU, torch.float32, batch=2)
    torch.testing.assert_close(run(made, pixels), eager, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_it_is_as_near_as_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path))
    network, inputs = folded(small()), images()
    exact = run(network, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(network, inputs)
    made = Compiled(network, SHAPE, CPU, torch.bfloat16, name="small")
    found = run(made, inputs)
    assert found.dtype == torch.bfloat16
    off, allowed = (found - exact).abs().mean(), (cast - exact).abs().mean()
    assert 0 < off < 2 * allowed


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    config = config_of("pan", "tu-test_resnet", 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path_factory.mktemp("predictor")))
        return {
            how: Predictor(
                [(network_of(config), config)],
                Prediction(precision="float32", compile=how, tta="all"),
                batch=3,
                threads=2,
            )
            for how in ("on", "off", "auto")
        }


def test_a_predictor_predicts_the_same(predictors: dict[str, Predictor]) -> None:
    assert predictors["on"].compiled
    assert not predictors["off"].compiled
    assert not predictors["auto"].compiled  # for there is no GPU
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 128, 128, 3), dtype=np.uint8))
    scores = {how: run(one.scores, pixels) for how, one in predictors.items()}
    torch.testing.assert_close(scores["on"], scores["off"], rtol=1e-3, atol=1e-4)
    assert torch.equal(scores["auto"], scores["off"])


def test_its_threads_predict_at_once(predictors: dict[str, Predictor]) -> None:
    made = predictors["on"]
    made.warm_up()
    assert made.time_batches() == 6


def test_what_is_chosen_where() -> None:
    trained, exported = [nn.Identity()], [nn.Identity(), Exported(lambda x: x)]
    gpu = torch.device("cuda")
    assert chooses_to_compile("auto", trained, gpu)
    assert not chooses_to_compile("auto", trained, CPU)
    assert chooses_to_compile("on", trained, CPU)
    assert not chooses_to_compile("off", trained, gpu)
    assert not chooses_to_compile("auto", exported, gpu)
    with pytest.raises(ConfigError, match="--compile off"):
        chooses_to_compile("on", exported, gpu)


CUDA = """
#include <torch/csrc/inductor/aoti_include/cuda.h>
extern "C" int version() {
    int found = 0;
    cuDriverGetVersion(&found);
    return found;
}
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is without CUDA")
def test_a_package_for_cuda_can_be_linked_by_what_comes_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch compiles and links one, without CUDA's toolkit, with a stand-in for the
    driver: the one thing that a machine with a GPU brings."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *v) { return 0; }")
    driver = tmp_path / "libcuda.so.1"
    link = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
    subprocess.run([*link, str(tmp_path / "driver.c")], check=True)
    ctypes.CDLL(str(driver))  # as torch has loaded the real one
    source = tmp_path / "program.cpp"
    source.write_text(CUDA)
    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with cuda_toolkit(new):
        assert (new / "driver" / "libcuda.so").resolve() == driver
        options = CppTorchDeviceOptions(device_type="cuda", aot_mode=True)
        assert not any("/usr/local" in path for path in options.get_include_dirs())
        builder = CppBuilder("program", [str(source)], options, str(tmp_path))
        builder.build()
    needed = subprocess.run(
        ["readelf", "-d", builder.get_target_file_path()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "libcuda.so.1" in needed.stdout
