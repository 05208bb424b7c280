"""The map in style.md §2-§3 is true: arrows point one way, names do not hide Python's own, packages say what they are.

Imports are read from the syntax tree, not by importing: also those inside functions count.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "maws", "eval")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The entry points tie the ends together and may see everything (style.md §3).
ENTRY_POINTS = {"maws/train.py", "maws/__main__.py", "eval/__main__.py"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file names in an import, at any depth: `from a import b` counts as `a` and as `a.b`."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [(base, node.lineno)] + [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def under(module: str, *tops: str) -> bool:
    return any(module == top or module.startswith(top + ".") for top in tops)


def offences(files: list[Path], forbidden) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for module, line in imports(path)
        if forbidden(module)
    ]


def files_under(*folders: str, but: tuple[str, ...] = ()) -> list[Path]:
    names = {path: str(path.relative_to(ROOT)) for path in FILES}
    return [
        path
        for path, name in names.items()
        if name not in ENTRY_POINTS
        and any(name == f or name.startswith(f + "/") for f in folders)
        and not any(name == f or name.startswith(f + "/") for f in but)
    ]


def test_the_three_packages_are_there():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


def test_data_pipeline_needs_neither_torch_nor_the_other_packages():
    heavy = ("torch", "torchvision", "timm", "transformers", "deepspeed", "maws", "eval")
    assert not offences(files_under("data_pipeline"), lambda module: under(module, *heavy))


def test_maws_knows_nothing_of_eval():
    assert not offences([f for f in FILES if f.relative_to(ROOT).parts[0] == "maws"], lambda m: under(m, "eval"))


def test_maws_sees_only_the_files_on_disk_side_of_data_pipeline():
    allowed = ("data_pipeline.shardset", "data_pipeline.images", "data_pipeline.errors", "data_pipeline.ending")
    assert not offences(
        files_under("maws"),
        lambda module: under(module, "data_pipeline") and module != "data_pipeline" and not under(module, *allowed),
    )


@pytest.mark.parametrize(
    ("folder", "must_not_see"),
    [
        ("maws/models", ("maws.objectives", "maws.stages", "maws.trainer", "maws.engine", "maws.data.loader")),
        ("maws/objectives", ("maws.stages", "maws.trainer", "maws.engine")),
        ("maws/stages", ("maws.trainer", "maws.engine", "maws.train")),
        ("maws/engine.py", ("maws.trainer", "maws.stages", "maws.objectives", "maws.train")),
        ("maws/trainer.py", ("maws.stages", "maws.objectives", "maws.models", "maws.train")),
        ("maws/data", ("maws.stages", "maws.objectives", "maws.trainer", "maws.engine", "maws.train")),
        ("eval/evaluators", ("eval.report", "eval.__main__")),
    ],
)
def test_arrows_inside_a_package_point_one_way(folder, must_not_see):
    assert not offences(files_under(folder), lambda module: under(module, *must_not_see))


def test_only_engine_imports_deepspeed():
    assert not offences(
        [path for path in FILES if path != ROOT / "maws/engine.py"], lambda module: under(module, "deepspeed")
    )


def test_only_entry_points_and_tests_import_the_main_job():
    assert not offences(
        [path for path in FILES if str(path.relative_to(ROOT)) not in ENTRY_POINTS], lambda m: under(m, "maws.train")
    )


def test_no_module_beside_train_py_has_the_name_of_a_standard_module():
    """`maws/` is first on the path when maws/train.py runs: maws/logging.py would replace the standard one."""
    beside = {path.stem for path in (ROOT / "maws").glob("*.py")} | {
        path.name for path in (ROOT / "maws").iterdir() if path.is_dir()
    }
    beside -= {"__init__", "__main__", "__pycache__"}
    assert not beside & set(sys.stdlib_module_names)


def test_nobody_writes_import_eval():
    """`import eval` hides the builtin; write `from eval.metrics import topk`."""
    files = [*FILES, *(ROOT / "demo").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import) and any(a.name == "eval" or a.asname == "eval" for a in node.names)
    ]
    assert not plain


def test_every_module_says_in_its_first_line_what_it_is_for():
    silent = [str(path.relative_to(ROOT)) for path in FILES if not (ast.get_docstring(tree(path)) or "").strip()]
    assert not silent


def test_every_folder_with_modules_is_a_package():
    """setup.cfg finds packages by their __init__.py: a folder without one would be missing from an installation."""
    assert not {str(path.parent.relative_to(ROOT)) for path in FILES if not (path.parent / "__init__.py").exists()}


# The checks above are only as good as the reader of imports: these show that it sees an arrow that points back.
def test_an_import_inside_a_function_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "maws" / "models" / "vit.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from maws.trainer import train\n    from ..objectives import x\n    import eval.metrics\n"
    )
    seen = dict(imports(path))
    assert seen["maws.trainer"] == 2
    assert seen["maws.objectives.x"] == 3
    assert seen["eval.metrics"] == 4
