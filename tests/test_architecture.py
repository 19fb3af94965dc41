"""Machine-checkable rules of the code base."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "simsiam"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = {
    0: ("config", "runs", "compute", "console", "ranks", "kernels", "convolutions"),
    1: ("data", "encoders", "heads", "optim", "neighbours", "collapse", "recipes"),
    2: ("methods", "features", "weights", "embed", "embeddings"),
    3: ("search", "duplicates", "clusters"),
    4: ("evaluate", "recipe", "defaults", "monitor", "finetune", "assess"),
    5: ("session", "probe", "step", "train", "show", "export", "released"),
    6: ("reproduce", "plan"),
    7: ("cli", "tables", "catalogue", "__main__", "__init__"),
}
ROOM = {name: room for room, names in ROOMS.items() for name in names}


def imports(path: Path) -> set[str]:
    """Return all modules of the package that a file imports, at any level, except in TYPE_CHECKING blocks."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "simsiam":
                base = child.module.removeprefix("simsiam").removeprefix(".")
                for alias in child.names:
                    inner = f"{base}.{alias.name}".strip(".")
                    found.add(inner if inner in MODULES else base)
            if isinstance(child, ast.Import):
                found.update(alias.name.removeprefix("simsiam.") for alias in child.names if "simsiam." in alias.name)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found - {""}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_only_go_down(name: str) -> None:
    top = name.split(".")[0]
    assert top in ROOM, f"{top} stands in no room: add it to ROOMS here and to docs/how-it-works.md"
    for other in imports(MODULES[name]):
        assert ROOM[other.split(".")[0]] <= ROOM[top], f"{name} imports {other}, which stands above it"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items() if name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        for other in graph[name]:
            visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_training_does_not_notice_when_show_is_gone() -> None:
    reached, queue = set(), ["train"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += imports(MODULES[name]) & MODULES.keys()
    assert not {name for name in reached if name.startswith(("show", "cli", "export"))}


def test_no_drawer_for_everything() -> None:
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not names & {"utils", "common", "helpers", "misc", "legacy"}


def test_no_pickle_is_ever_loaded() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                base = (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else ""
                assert not ({base} if base else names) & {"pickle", "joblib", "dill"}, name
                assert not (base in ("torch", "numpy") and "load" in names), f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                torchs = ast.unparse(node.func) == "torch.load"
                safe = keywords.get("weights_only" if torchs else "allow_pickle", "False") == str(torchs)
                assert safe, f"{name}: {ast.unparse(node)}"


def test_the_file_tree_in_the_docs_is_true() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*\.py)`", text))
    real = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES.values()
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert told == real, f"missing in the docs: {sorted(real - told)}; no longer there: {sorted(told - real)}"


def anchors(page: Path) -> set[str]:
    """Return the addresses that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
def test_links_in_the_docs_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" not in target:
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), target
            assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{target}#{anchor}"
