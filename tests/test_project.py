"""The project's own promises: pins with reasons, one set for pip and conda, formatted and linted, imports that point down."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import yaml
from hatchling.builders.wheel import WheelBuilder

from moepress.composing import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_dependency_is_pinned_and_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    assert "torch==2.13.0" in dependencies
    for dependency in dependencies:
        assert re.fullmatch(r"[\w-]+==[\w.]+(; platform_system == 'Linux')?", dependency), dependency
        assert re.search(rf'"{re.escape(dependency)}", +# .{{10,}}', text), f"{dependency} has no reason beside it"


def test_every_dependency_is_used():
    code = "\n".join(path.read_text() for folder in ("src", "workflow") for path in (ROOT / folder).rglob("*.*[yk]"))
    modules = {"hydra-core": "hydra", "lm-eval": "lm_eval", "pyyaml": "yaml", "pyarrow": "to_parquet"}
    for dependency in PROJECT["project"]["dependencies"]:
        name = dependency.split("==")[0]
        assert re.search(rf"\b{modules.get(name, name)}\b", code), f"nothing uses {name}"


def test_conda_takes_the_same_set():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[-1]["pip"] == ["torch==2.13.0", "-e .[dev]"]


def test_make_refuses_a_python_that_will_not_do_before_it_downloads(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    makefile = (ROOT / "Makefile").read_text()
    least, below = (version.split(".") for version in re.findall(r"\d+\.\d+", PROJECT["project"]["requires-python"]))
    assert f"({', '.join(least)}) <= sys.version_info < ({', '.join(below)})" in makefile
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`, if it is that
    for python, allowed in (("false", False), (sys.executable, True)):
        # make tells what it would do; the check, told alone, is run
        told = subprocess.run(
            ["make", "-n", "install", f"PYTHON={python}"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        checked = subprocess.run(told.stdout.splitlines()[0], shell=True, capture_output=True, text=True)
        assert (checked.returncode == 0) == allowed
        assert allowed or "PYTHON='false' is no Python 3.11, 3.12 or 3.13; install one" in checked.stderr


def test_the_wheel_works_outside_its_checkout(tmp_path):
    """It has the configuration, the workflow with its default profile, and the plugin where Hydra finds it."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "wheel"), versions=["standard"]))
    installed, place = tmp_path / "site", tmp_path / "place"
    place.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    for folder in ("conf", "workflow"):
        for path in (ROOT / folder).rglob("*.*"):
            assert path.is_dir() or (installed / "moepress" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    say = "import moepress, hydra_plugins.moepress_launcher as plugin; print(moepress.__file__, plugin.__file__)"
    dry = ["-m", "snakemake", "-s", str(installed / "moepress" / "Snakefile"), "--cores", "1", "-n", "--quiet", "rules"]
    for command in (["-c", say], ["-m", "moepress", "--cfg", "hydra"], dry):
        done = subprocess.run([sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if command is dry:
            assert f"profile {installed}/moepress/profiles/default" in done.stderr
        else:
            assert str(ROOT / "src") not in done.stdout and str(installed) in done.stdout


MATH = ["allocation", "quantization/grid", "quantization/gptq", "quantization/router", "quantization/packing"]
MATH += ["pruning/pesf", "pruning/odp", "pruning/static"]


def imports(path):
    """The moepress modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moepress"):
            yield from ([f"{node.module}.{n.name}" for n in node.names] if node.module == "moepress" else [node.module])


LAYERS = [
    {"secrets", "progress", "schema", "wording"},
    {"data"},
    {"models"},
    {"quantization", "inference", "pruning", "allocation", "gradients", "statistics", "evaluation", "latency"},
    {"composing", "config", "machine", "dag", "work"},
    {"artefacts", "integrity", "lookup", "locks", "report", "tracking"}
    | {"plan", "studies", "execution", "patches", "buckets", "export", "estimate", "forecast"},
    {"stages", "commands", "sweeps", "api", "cli", "__main__", "__init__"},
]
"""As docs/architecture.md draws them: a module imports from its own row and those above it."""


def test_imports_point_one_way():
    source = ROOT / "src" / "moepress"
    row = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in source.rglob("*.py"):
        relative = path.relative_to(source)
        own = relative.parts[0].removesuffix(".py")
        for found in imports(path):
            assert found == "moepress" or row[found.split(".")[1]] <= row[own], f"{relative} imports {found}"
            assert own == "stages" or not found.startswith("moepress.stages"), f"{relative} imports {found}"
            assert own != "stages" or found not in ("moepress.plan", "moepress.dag"), f"{relative}: a stage knows no DAG"
    for name in MATH:
        for found in imports(source / f"{name}.py"):
            assert found.startswith(("moepress.quantization", "moepress.pruning")), f"{name} imports {found}"


def file_tree() -> str:
    """Every module of the package with the first sentence of its docstring."""

    def lines(folder, indent=""):
        for path in sorted(folder.glob("*.py"), key=lambda path: path.name):
            if not path.name.startswith("__"):
                yield indent + path.name, path
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            yield f"{indent}{inner.name}/", inner / "__init__.py"
            yield from lines(inner, indent + "  ")

    def sentence(path) -> str:
        paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
        return re.split(r"(?<=[.:;]) ", paragraph)[0].rstrip(".:;") if len(paragraph) > 125 else paragraph.rstrip(".:")

    return "\n".join(f"{name:23} {sentence(path)}" for name, path in lines(ROOT / "src" / "moepress"))


def test_the_architecture_lists_every_file():
    told = (ROOT / "docs" / "architecture.md").read_text()
    assert file_tree() in told, "python tests/test_project.py writes the list anew"


def test_no_two_modules_import_each_other():
    """At the top of files, directly or through others; what is imported where it is used may."""
    source = ROOT / "src"
    names = {".".join(p.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): p for p in source.rglob("*.py")}
    graph = {}
    for name, path in names.items():
        top = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module)
        found = {f"{n.module}.{a.name}" if f"{n.module}.{a.name}" in names else n.module for n in top for a in n.names}
        graph[name] = found & names.keys() - {name}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_only_families_knows_architectures():
    for path in (ROOT / "src").rglob("*.py"):
        if path.name not in ("families.py", "tiny.py") and path.parent.name != "schema":
            assert not re.search(r"mixtral|block_sparse_moe|\bw1\b", path.read_text(), re.IGNORECASE), path


if __name__ == "__main__":
    document = ROOT / "docs" / "architecture.md"
    before = document.read_text().partition("## Every file\n")[0]
    document.write_text(
        f"{before}## Every file\n\n`python tests/test_project.py` writes this list.\n\n```\n{file_tree()}\n```\n"
    )
