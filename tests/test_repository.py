"""The repository keeps its own rules: sizes, floors, names with one owner, and a README that matches the files.

Conventions of README.md that are read here: commands stand in ```sh blocks, one a line; the file tree is the fenced
block whose first line starts with `src/moesaic/`: one path a line, nested by indentation, folders ending in `/`, then
a phrase. A file `MODEL_TYPE.py` stands for one file of that name per supported model family.
"""

import ast
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.checkpoint.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moesaic"
README = ROOT / "README.md"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

SOURCES = sorted(
    path
    for folder in ("src", "csrc", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyi", ".cpp", ".h")
)
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))

# A regular expression, the files of src/moesaic that may contain it, and why the others may not.
OWNED_WORDS = [
    (r"\bgrouped_mm\b", {"ops/grouped.py"}, "ops/grouped.py is the only caller of grouped_mm"),
    (r"\btorch\.(save|load)\b|\bimport pickle\b", set(), "nothing is written or read as pickle"),
    (r"trust_remote_code", set(), "no code that comes with a checkpoint is run"),
    (r"\b(TODO|FIXME|XXX)\b", set(), "open work is an issue, not a comment"),
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced_blocks(markdown: str, language: str | None = None) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if language is None or name == language]


def tree_paths(block: str) -> list[str]:
    """Paths of a file tree: indentation (or box-drawing lines) nests, the first word of a line is the name."""
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        plain = re.sub(r"[│├└─|]", " ", line)
        if not plain.strip():
            continue
        depth = len(plain) - len(plain.lstrip())
        name = plain.split()[0]
        folders = [(other_depth, folder) for other_depth, folder in folders if other_depth < depth]
        path = (folders[-1][1] if folders else "") + name
        paths.append(path)
        if name.endswith("/"):
            folders.append((depth, path))
    return paths


def readme_tree() -> list[str]:
    trees = [block for block in fenced_blocks(README.read_text()) if block.startswith("src/moesaic/")]
    assert len(trees) == 1, "README.md needs one fenced file tree whose first line starts with src/moesaic/"
    paths = []
    for path in tree_paths(trees[0]):
        families = [path.replace("MODEL_TYPE", family) for family in FAMILIES]
        paths += families if "MODEL_TYPE" in path else [path]
    return paths


def readme_commands() -> list[str]:
    lines = [line for block in fenced_blocks(README.read_text(), "sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_files_are_short():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    long = {}
    for path in PACKAGE_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{relative(path)}:{node.name}"] = length
    assert long == {}


@pytest.mark.parametrize(("pattern", "owners", "reason"), OWNED_WORDS, ids=[row[2] for row in OWNED_WORDS])
def test_words_stay_with_their_owner(pattern: str, owners: set[str], reason: str):
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE_FILES if re.search(pattern, path.read_text())}
    assert users - owners == set(), reason
    assert owners <= users, f"{owners - users} no longer contains {pattern}: remove it from the owners"


def test_floors_hold():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_folders_of_tests_mirror_the_package():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [folder for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_readme_tree_names_existing_paths():
    assert [path for path in readme_tree() if not (ROOT / path).exists()] == []


def test_readme_tree_names_every_file_of_the_package():
    named = {path.rstrip("/") for path in readme_tree()}
    expected = {relative(path) for path in PACKAGE_FILES if path.name not in ("__init__.py", "__main__.py")}
    assert expected - named == set()


def test_readme_commands_exist():
    commands = readme_commands()
    assert any(command.startswith("make demo") for command in commands)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {line.split()[1] for line in commands if line.startswith("make ")} - targets == set()
    help_command = [sys.executable, "-m", "moesaic", "--help"]
    help_text = subprocess.run(help_command, capture_output=True, text=True, check=True).stdout
    subcommands = {match[1] for line in commands if (match := re.match(r"(?:\S*/)?moesaic ([a-z]+)", line))}
    assert {name for name in subcommands if not re.search(rf"\b{name}\b", help_text)} == set()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_things_that_exist(document: str):
    text = (ROOT / document).read_text()
    for name in re.findall(r"`(moesaic(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


def test_tree_parser():
    block = "src/moesaic/  all\n  ops/   math\n    permute.py  sort\n  config.py  words\ncsrc/  C++\n  a.cpp\n"
    expected = ["src/moesaic/", "src/moesaic/ops/", "src/moesaic/ops/permute.py", "src/moesaic/config.py"]
    assert tree_paths(block) == [*expected, "csrc/", "csrc/a.cpp"]
    drawn = "src/moesaic/\n├── ops/\n│   └── permute.py  sort\n└── config.py  words\ncsrc/\n└── a.cpp\n"
    assert tree_paths(drawn) == tree_paths(block)
