"""Set-up: what setup.cfg, constraints.txt and the Makefile promise. Nothing is installed here."""

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from forks import Forked, server_printed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IMPORT_NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn",
    "markupsafe": "jinja2",
}
# imported where they are used, behind an extra
EXTRAS_ONLY = {"ray": "cluster", "wandb": "wandb", "open_clip": "clip", "peft": "lora", "scipy": "mat"}


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    found = [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.fixture(scope="module")
def pinned():
    return requirements((ROOT / "constraints.txt").read_text())


def all_requirements(setup) -> dict[str, Requirement]:
    found = requirements(setup["options"]["install_requires"])
    for text in setup["options.extras_require"].values():
        found |= requirements(text)
    return found


# -------------------------------------------------------------------------------------------------------- dependencies


def test_the_tested_versions_are_within_the_ranges(setup, pinned):
    outside = [
        f"{name} {requirement.specifier} but {pinned[name]}"
        for name, requirement in all_requirements(setup).items()
        if name in pinned and not requirement.specifier.contains(next(iter(pinned[name].specifier)).version)
    ]
    assert not outside


def test_everything_that_make_installs_is_pinned(setup, pinned):
    wanted = requirements(setup["options"]["install_requires"]) | requirements(setup["options.extras_require"]["dev"])
    assert not wanted.keys() - pinned.keys()


def test_pins_name_one_public_version_each(pinned):
    for requirement in pinned.values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, f"{requirement}: a local version is on no package index"
        assert not requirement.url


def test_every_dependency_has_a_reason_above_it():
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    for section in ("install_requires =", "[options.extras_require]"):
        start = lines.index(section) + 1
        for number in range(start, len(lines)):
            if not lines[number].strip() or (section == "install_requires =" and not lines[number].startswith(" ")):
                break
            is_item = lines[number].startswith("    ") and not lines[number].strip().startswith("#")
            if section == "install_requires =" and is_item:
                assert lines[number - 1].strip().startswith("#"), lines[number]
            if section != "install_requires =" and re.fullmatch(r"\w+ =", lines[number]):
                assert lines[number - 1].startswith("#"), lines[number]


def test_every_package_that_is_imported_is_a_dependency(setup):
    core = requirements(setup["options"]["install_requires"])
    missing = []
    for path in (p for package in ("data_pipeline", "maws", "eval", "demo") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                known = name in sys.stdlib_module_names or name in ("data_pipeline", "maws", "eval")
                if (
                    not known
                    and name not in EXTRAS_ONLY
                    and canonicalize_name(IMPORT_NAMES.get(name, name)) not in core
                ):
                    missing.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not missing


def test_dependencies_import_without_a_warning():
    """Warnings are errors in our tests: a new release of a library that warns on import is noticed here first."""
    process = Forked("test_packaging:import_the_rest", env=os.environ, cwd=ROOT, path=[str(ROOT / "tests")])
    assert process.wait(120) == 0, process.printed()
    assert "Warning: " not in server_printed()  # torch, DeepSpeed and what else it has imported for all ranks


def import_the_rest() -> None:
    """In a process forked from one that has imported what training needs."""
    warnings.simplefilter("error")
    for name in (
        "numpy", "torch", "torchvision", "timm", "transformers", "tokenizers", "sentencepiece", "deepspeed", "nltk",
        "pyarrow", "webdataset", "PIL", "safetensors", "rich", "matplotlib", "jinja2", "fsspec", "open_clip",
    ):  # fmt: skip
        importlib.import_module(name)


# ------------------------------------------------------------------------------------------------------------ packages


def test_packages_and_their_data_are_found(setup):
    include = setup["options.packages.find"]["include"].split()
    assert include == ["data_pipeline", "data_pipeline.*", "maws", "maws.*", "eval", "eval.*"]
    for package, patterns in setup["options.package_data"].items():
        for pattern in patterns.split():
            assert any((ROOT / package).glob(pattern)), f"{package}/{pattern} matches no file"


def test_files_that_the_packages_read_are_package_data(setup):
    data = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split()
        for path in (ROOT / package).glob(pattern)
    }
    files = (path for package in ("data_pipeline", "maws", "eval") for path in (ROOT / package).rglob("*"))
    others = {path for path in files if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert not others - data


def test_licences_of_shipped_data_are_shipped(setup):
    for name in setup["metadata"]["license_files"].split():
        assert (ROOT / name).is_file(), name
    notice = (ROOT / "NOTICE").read_text()
    for maker in ("Princeton", "Google", "Twitter", "OpenMoji", "Microsoft", "Emoji One", "Unicode", "emojilib"):
        assert maker in notice


def test_no_file_of_the_demo_corpus_is_without_a_row_in_its_readme():
    readme = (ROOT / "demo" / "emoji" / "README.md").read_text()
    for path in (ROOT / "demo" / "emoji").iterdir():
        assert path.name == "README.md" or path.name in readme, path.name


def test_ruff_guards_the_names_that_would_hide_others():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "A" in lint["select"] and lint["flake8-builtins"]["strict-checking"] is True


# ------------------------------------------------------------------------------------------------------------ Makefile

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


def make(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [str(shutil.which("make")), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path):
    """The files that make looks at, in a folder without .venv."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def tools(tmp_path):
    """A PATH with the shell's own tools and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "rm", "touch", "env"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "clean", "help"])
def test_a_dry_run_does_nothing(project, target):
    before = sorted(path.name for path in project.iterdir())
    done = make(project, "-n", target)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in project.iterdir()) == before


@needs_make
def test_without_a_new_enough_python_one_line_says_so(project, tools):
    program(tools / "python3", "exit 1")
    done = make(project, "test", path=str(tools))
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith(
        "error: Python 3.11 or newer is needed and none of these is: python3.11"
    )
    assert "make PYTHON=/path/to/python3.11" in done.stderr
    assert not (project / ".venv").exists()


@needs_make
def test_without_the_venv_module_one_line_says_so(project, tools):
    program(tools / "python3.11", 'case "$2" in *venv*) exit 1;; esac; exit 0')
    done = make(project, "test", path=str(tools))
    assert done.returncode != 0
    assert "error: python3.11 has no venv module; on Debian and Ubuntu: apt-get install python3-venv" in done.stderr


@needs_make
def test_the_environment_is_installed_again_only_when_what_it_depends_on_changes(project):
    stamp = project / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    later = stamp.stat().st_mtime + 10
    os.utime(stamp, (later, later))
    assert "pip install" not in make(project, "-n", "test").stdout
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        old = (project / name).stat().st_mtime
        os.utime(project / name, (later + 10, later + 10))
        assert "pip install" in make(project, "-n", "test").stdout
        os.utime(project / name, (old, old))


@needs_make
def test_arguments_reach_what_is_run(project):
    assert "-m pytest -k wsp" in make(project, "-n", "test", "ARGS=-k wsp").stdout
    assert '-m pytest -m "" -k wsp' in make(project, "-n", "test-all", "ARGS=-k wsp").stdout
    assert "demo/run.py --fresh" in make(project, "-n", "demo", "FRESH=1").stdout
    assert "--fresh" not in make(project, "-n", "demo", "FRESH=0").stdout


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
