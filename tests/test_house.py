"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("src", "tests", "benchmarks", "examples", "reproductions", "docs")
MAX_LINES = 400

# Imports point one way: a package imports from those before it alone, and no two stand at one place.
ORDER = (
    "errors",
    "settings",
    "printing",
    "processes",
    "threads",
    "plotting",
    "ops",
    "optim",
    "memory",
    "layers",
    "models",
    "levels",
    "continual",
    "tasks",
    "evaluation",
    "training",
    "cli",
    "demo",
    "__main__",
)


# Packages whose modules are used by calls, and what may read a part's weights all the same: by file, the function and
# the expression. `reset_parameters` draws first values and may always.
CALLED = ("layers", "memory", "models")
OWN = ("self", "state", "config", "self.config")
READ_WITH_REASON = {
    ("modeling.py", "__init__: self.embed_tokens.weight"),  # made on the meta device or not
    ("modeling.py", "_init_weights: module.weight"),  # first values
    ("modeling.py", "_init_weights: self.norm.weight"),
    ("conversion.py", "_config: attention.q_proj.bias"),  # of a model that is to be converted
    ("conversion.py", "_config: attention.o_proj.bias"),
    ("convertible.py", "has_own_head: cast(Any, m).weight"),
    ("convertible.py", "_check_modules: cast(nn.Embedding, m).weight"),
    ("self_modifying.py", "_learn: loop.run"),  # no module
    ("long_term_memory.py", "_learn: loop.run"),
    ("sequence.py", "_continue: self.run"),  # what a call of the layer does
}


def python_files() -> list[Path]:
    """Every Python file of the repository."""
    return sorted(p for folder in CODE for p in (ROOT / folder).rglob("*.py"))


def prose_files() -> list[Path]:
    """Every Markdown file of the repository, the environment and outputs apart."""
    folders = [ROOT / name for name in (*CODE, ".github")]
    return sorted([*ROOT.glob("*.md"), *(p for folder in folders for p in folder.rglob("*.md"))])


def name_of(path: Path) -> str:
    """The path as a test's name."""
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def for_each(paths: Iterable[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of all files, which names every file that fails: a test for each takes longer than what it looks at."""

    def decorate(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    wrong.append(str(error).splitlines()[0])
            assert not wrong, "\n".join(wrong)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@for_each(python_files())
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    """At most 400 lines."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; part it in two by subject"


@for_each(python_files())
def test_annotations_are_postponed(path: Path) -> None:
    """Shape annotations are strings to Python, so a file that has annotations must not evaluate them."""
    tree = parse(path)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    annotated = any(f.returns or any(a.annotation for a in f.args.args + f.args.kwonlyargs) for f in functions)
    postponed = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    assert postponed or not annotated, f"{name_of(path)} needs: from __future__ import annotations"


@for_each([p for p in python_files() if p.is_relative_to(ROOT / "src")])
def test_public_things_are_documented(path: Path) -> None:
    """Modules, public classes, public functions and public methods have docstrings."""
    if not path.read_text(encoding="utf-8").strip():
        return
    missing = [name for name, node in _public(parse(path)) if not ast.get_docstring(node)]
    assert not missing, f"{name_of(path)} has no docstring for {', '.join(missing)}"


@for_each([p for p in python_files() if p.is_relative_to(ROOT / "src")])
def test_imports_point_one_way(path: Path) -> None:
    """From ops and optim over memory, layers and models up to continual, training and the commands."""
    own = path.relative_to(ROOT / "src" / "nestling").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in ORDER, f"give {own} a place in tests/test_house.py"
    for imported in {module.split(".")[1] for module in _imported_modules(parse(path)) if "." in module} - {own}:
        lower = ORDER.index(imported) < ORDER.index(own)
        assert lower, f"{name_of(path)} imports nestling.{imported}, which stands above it"


def test_modules_do_not_import_each_other() -> None:
    """Not even inside a package or a function: what two modules need is a third one's. Imports for types are free."""
    files = {_module_of(path): path for path in python_files() if path.is_relative_to(ROOT / "src")}
    graph = {name: (_imported_modules(parse(path)) & files.keys()) - {name} for name, path in files.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@for_each([p for p in python_files() if p.is_relative_to(ROOT / "src")])
def test_layers_are_called(path: Path) -> None:
    """No layer's weight or bias is read from outside, and no `forward` or `run` is called in place of the layer.

    Hooks, adapters, low ranks, rules that need inputs, quantized products and offloading act in the call alone.
    """
    if path.relative_to(ROOT / "src" / "nestling").parts[0] in CALLED:
        passed_by = [found for found in _past_the_call(parse(path)) if (path.name, found) not in READ_WITH_REASON]
        assert not passed_by, f"{name_of(path)} does not call the module in {', '.join(passed_by)}"


@for_each([*python_files(), *prose_files()])
def test_prose_has_no_long_dashes(path: Path) -> None:
    """A comma, a colon or a full stop says which of the three is meant."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search("[\u2013\u2014]", line), f"{name_of(path)}:{number} has an en or em dash"


@for_each([p for p in prose_files() if "reproductions" not in p.parts])
def test_prose_has_lines_that_a_diff_can_show(path: Path) -> None:
    """At most 160 characters without links' targets; tables, code and generated reports are as wide as they are."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if fenced or line.startswith(("    ", "\t", "|")):
            continue
        length = len(re.sub(r"\]\([^)]*\)", "]", line))
        assert length <= 160, f"{name_of(path)}:{number} has {length} characters; break the line"


@for_each(prose_files())
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links of Markdown files name files that exist."""
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{name_of(path)} links to {target}, which does not exist"


def test_every_dependency_has_a_tested_version() -> None:
    """constraints.txt pins each direct dependency exactly, and names no local build such as +cpu."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {_canonical(name) for name in pins}
    for requirement in wanted:
        name = _canonical(re.split(r"[\[<>=~! ]", requirement)[0])
        assert name in names or name == "nestling", f"constraints.txt does not pin {name}"
    assert not [name for name, version in pins.items() if "+" in version]


def test_the_version_is_said_once() -> None:
    """pyproject.toml, the package and the changelog agree."""
    import nestling

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert nestling.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _public(tree: ast.Module) -> list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    found: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [("the module", tree)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                found.extend((f"{node.name}.{m.name}", m) for m in methods if not _is_overload(m))
    return found


def _past_the_call(tree: ast.Module) -> list[str]:
    """`function: expression` of every weight or bias read of another object, and every `forward` and `run`."""
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name != "reset_parameters":
            for node in ast.walk(function):
                called = isinstance(node, ast.Attribute) and node.attr in ("forward", "run")
                read = isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")
                owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
                if (called and owner != "super()") or (read and owner not in OWN):
                    found.append(f"{function.name}: {ast.unparse(node)}")
    return found


def _is_overload(function: ast.FunctionDef) -> bool:
    return any("overload" in ast.unparse(d) for d in function.decorator_list)


def _module_of(path: Path) -> str:
    """Its name to an import."""
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(tree: ast.Module) -> set[str]:
    """The modules of nestling that a file imports, those for type checkers alone apart.

    `from nestling.x import y` means nestling.x.y where that is a module, else nestling.x.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                file = ROOT / "src" / Path(*name.split("."))
                found.add(name if file.is_dir() or file.with_suffix(".py").exists() else node.module)
    return {name for name in found if name.split(".")[0] == "nestling"}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
