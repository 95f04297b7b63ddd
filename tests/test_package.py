# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The built package: what sdist and wheel hold, and that the installed wheel works without the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from florence_vl_hf.modeling.modeling_florence_vl import FlorenceVLForConditionalGeneration

from .conftest import FIXTURES, llava_sample


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PHI = FIXTURES / "phi-small"
# What tools and users leave in a checkout, and no build may depend on.
NOT_SOURCES = (".*", "build", "dist", "runs", "quickstart-*", "ablation-*", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside the repository, without this environment's `PYTHONPATH`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, built from a copy of the repository, and the wheel, built from the sdist."""
    source, output = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=output)
    return output


@pytest.fixture(scope="module")
def package_files() -> set[str]:
    """All files of the package and of its command line in the repository, relative to `src`."""
    source = ROOT / "src"
    files = (path.relative_to(source) for path in source.glob("florence_vl_*/**/*") if path.is_file())
    return {path.as_posix() for path in files if path.suffix != ".pyc" and ".egg-info" not in path.parts[0]}


@pytest.fixture(scope="module")
def binaries(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of a new environment that holds the wheel, and reads the dependencies of this one."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=False)
    binaries = directory / "bin"
    python = binaries / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", query, cwd=directory).stdout.strip())
    # A path in a .pth file is searched, but its own .pth files, such as an editable install's, are not run.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
    [wheel] = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=directory)
    return binaries


def test_wheel_holds_the_package_and_nothing_else(built: Path, package_files: set[str]) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    name, version, *_ = wheel.name.split("-")
    assert names == package_files | {f"{name}-{version}.dist-info/{file}" for file in metadata}


def test_sdist_holds_the_package_and_what_describes_it(built: Path, package_files: set[str]) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    generated = {name for name in names if name.startswith("src/florence_vl_hf.egg-info/")}
    about = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    building = {"MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg"}
    assert names - generated == {f"src/{name}" for name in package_files} | about | building


def test_every_kind_of_file_is_shipped(package_files: set[str]) -> None:
    """The two tests above compare lists; this one says what must be on them."""
    assert "florence_vl_hf/py.typed" in package_files
    assert "florence_vl_hf/training/recipes/projector_8b.yaml" in package_files
    assert "florence_vl_hf/training/recipes/accelerate/fsdp2.yaml" in package_files
    assert "florence_vl_hf/conversion/record_reference.py" in package_files


def test_import_is_silent(binaries: Path, tmp_path: Path) -> None:
    result = run(binaries / "python", "-c", "import florence_vl_hf", cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("", "")


def test_converts_and_trains_without_the_repository(binaries: Path, tmp_path: Path) -> None:
    where = run(binaries / "python", "-c", "import florence_vl_hf; print(florence_vl_hf.__file__)", cwd=tmp_path)
    assert binaries.parent in Path(where.stdout.strip()).parents

    command, converted, trained = binaries / "florence-vl", tmp_path / "converted", tmp_path / "trained"
    run(command, "convert", PHI / "checkpoint", converted, cwd=tmp_path)
    samples = [llava_sample(number, ["odd.jpg"]) for number in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    settings = {
        "model_name_or_path": converted,
        "train_file": tmp_path / "data.json",
        "image_folder": PHI / "images",
        "output_dir": trained,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": "true",
    }
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    run(command, "train", "projector_8b", *changes, cwd=tmp_path)

    assert json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 10
    before, after = (
        FlorenceVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).state_dict()
        for directory in (converted, trained)
    )
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == {name for name in after if "multi_modal_projector" in name}
