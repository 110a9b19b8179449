"""No module can be reached from itself by imports, those inside functions counted; imports for types are not."""

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

# Written down, with the reason; nothing else may close a circle.
EXCEPTIONS = {
    # Users of Hugging Face expect Head.from_pretrained and Head.push_to_hub; reading a head of any format builds on
    # Head. Both methods only hand over to heads/hub.py.
    ("mmhooks.heads.base", "mmhooks.heads.hub"),
}


def test_no_import_circle_in_the_package():
    assert not circles(import_graph(ROOT, "mmhooks"))


def test_no_import_circle_in_the_recipes():
    assert not circles(import_graph(ROOT / "recipes", ""))


def test_the_exceptions_exist():
    """One that is no longer needed is deleted."""
    graph = import_graph(ROOT, "mmhooks")
    for edge in EXCEPTIONS:
        assert graph.has_edge(*edge), f"{edge} is no import any more"
        assert circles(graph, without=EXCEPTIONS - {edge}), f"{edge} closes no circle"


@pytest.mark.parametrize(
    "line",
    [
        "import a.y",
        "from a import y",
        "from a.y import name",
        "from . import y",
        "from .y import name",
        "def late():\n    from a.y import name",
        "if x:\n    import a.y as other",
    ],
)
def test_every_kind_of_import_counts(tmp_path, line):
    write(tmp_path, x=line, y="import a.x")
    assert circles(import_graph(tmp_path, "a")) == [["a.x", "a.y"]]


def test_imports_for_types_do_not_count(tmp_path):
    write(tmp_path, x="if TYPE_CHECKING:\n    from a.y import name", y="import a.x")
    assert not circles(import_graph(tmp_path, "a"))


def write(folder: Path, **files: str) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "__init__.py").touch()
    for name, text in files.items():
        (folder / "a" / f"{name}.py").write_text(text + "\n")


def circles(graph: nx.DiGraph, without: set[tuple[str, str]] | None = None) -> list[list[str]]:
    """The strongly connected components of more than one module, but for the written exceptions."""
    left = graph.copy()
    left.remove_edges_from(EXCEPTIONS if without is None else without)
    return sorted(sorted(part) for part in nx.strongly_connected_components(left) if len(part) > 1)


def import_graph(root: Path, package: str) -> nx.DiGraph:
    """Modules of ``root/package`` by their dotted names, and which imports which."""
    files = {name_of(path, root): path for path in (root / package).rglob("*.py")}
    graph = nx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for target in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
            module = nearest(target, files)
            if module is not None and module != name:
                graph.add_edge(name, module)
    return graph


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> list[str]:
    """Dotted names of everything that is imported anywhere but under ``if TYPE_CHECKING``."""
    names: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            names += [name for other in node.orelse for name in imported(other, package)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        else:
            names += imported(node, package)
    return names


def nearest(target: str, known: dict[str, Path]) -> str | None:
    """The module that ``from target`` reaches: itself, or the one that holds the name."""
    if target in known:
        return target
    holder = target.rpartition(".")[0]
    return holder if holder in known else None
