"""The embedded corpus: the standard library of the running Python, tens of megabytes of text that is always there.

Four domains: `modules`, `tests`, `documentation` (prose files and pydoc's topics) and `data tables` (character maps,
arithmetic test vectors, JSON, XML). The order is a mixture: any prefix holds the domains in the proportions of the
whole, so a run may read as much as it needs. Order and hold-out depend on the files' relative paths and sizes only.
Some systems ship Python without its tests; that domain is then small or missing.
"""

import ast
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from moesaic.errors import MoesaicError

MODULES, TESTS, DOCUMENTATION, DATA_TABLES = "modules", "tests", "documentation", "data tables"

_NOT_OURS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_PROSE = {".txt", ".rst", ".md", ".html"}
_TABLES = {".decTest", ".json", ".xml", ".toml", ".csv"}
_CODE = {".py", ".pyw", ".c", ".h"}
_TABLE_MODULES = {"html/entities.py", "stringprep.py"}
_CHARACTER_MAPS = ("cp", "iso8859", "mac_", "koi8", "hp_roman", "ptcp", "tis_", "kz")
_TOPICS = "pydoc_data/topics.py"
_FEWEST_HELD_OUT_BYTES = 32 * 2**10  # what a domain needs for a steady loss, unless that is a tenth of it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One text of the corpus: a file, or one topic of pydoc's."""

    text: str
    domain: str
    name: str
    held_out: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    domain: str
    size: int
    text: str | None = None
    """Filled for topics, which share a file; files are read when their turn comes."""

    @property
    def key(self) -> bytes:
        return hashlib.blake2b(self.name.encode("utf-8"), digest_size=8).digest()


def read(validation_fraction: float, root: Path | None = None) -> Iterator[Part]:
    """The corpus, first what is held out, then the training mixture; files are read one at a time.

    `root` stands in for the standard library's folder. In each domain about `validation_fraction` of the bytes
    are held out, at least one text (none for a fraction of 0). Files that are not UTF-8, as some tests are on
    purpose, are skipped and counted in the log. Raises MoesaicError when there is no library to read.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    entries = _list_entries(root)
    if not entries:
        raise MoesaicError(f"this Python has no standard library on disk at {root}; set data.source to a text file")
    held_out, training = _split(entries, validation_fraction)
    skipped = 0
    for position, entry in enumerate(_mix(held_out) + _mix(training)):
        try:
            text = entry.text or (root / entry.name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        if text:
            yield Part(text, entry.domain, entry.name, held_out=position < len(held_out))
    if skipped:
        _log.info("%d files of the standard library are not UTF-8 and were skipped", skipped)


def domain_of(name: str) -> str | None:
    """The domain of a path relative to the library's folder; None for what is not text to learn from."""
    path = PurePath(name)
    if path.stem.startswith("_sysconfigdata"):  # paths and flags of the machine that built this Python
        return None
    in_tests = any(part in ("test", "tests", "idle_test") for part in path.parts[:-1])
    if path.suffix in _TABLES or _is_table_module(path):
        return DATA_TABLES
    if path.suffix in _PROSE:
        return DATA_TABLES if in_tests else DOCUMENTATION
    if path.suffix in _CODE:
        return TESTS if in_tests else MODULES
    return None


def _is_table_module(path: PurePath) -> bool:
    """Character maps of `encodings` (cp1252, iso8859_1, mac_roman ...) and modules that are one big literal."""
    is_character_map = path.parts[0] == "encodings" and path.stem.startswith(_CHARACTER_MAPS)
    return is_character_map or path.as_posix() in _TABLE_MODULES


def _list_entries(root: Path) -> list[_Entry]:
    entries = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_OURS]
        for path in (Path(folder, name) for name in files):
            name = path.relative_to(root).as_posix()
            domain = domain_of(name)
            if domain is None or not path.is_file():
                continue
            entries += _topics(path) if name == _TOPICS else [_Entry(name, domain, path.stat().st_size)]
    return sorted(entries, key=lambda entry: (entry.key, entry.name))


def _topics(path: Path) -> list[_Entry]:
    """pydoc's topics are pages of the language reference, kept in one dict: each becomes a text of its own."""
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return [_Entry(f"{_TOPICS}:{name}", DOCUMENTATION, len(text), text) for name, text in topics.items()]
    return []


def _split(entries: list[_Entry], fraction: float) -> tuple[list[_Entry], list[_Entry]]:
    """Held-out and training entries. Entries are in hash order, so the first ones that fit are a fair draw."""
    if fraction == 0:
        return [], entries
    chosen: set[str] = set()
    for domain in {entry.domain for entry in entries}:
        members = [entry for entry in entries if entry.domain == domain]
        total = sum(entry.size for entry in members)
        left = max(fraction * total, min(_FEWEST_HELD_OUT_BYTES, total / 10))
        fitting: list[str] = []
        for entry in members:
            if 0 < entry.size <= left:
                fitting.append(entry.name)
                left -= entry.size
        if not fitting and len(members) > 1:
            fitting = [min(members, key=lambda entry: entry.size).name]
        chosen.update(fitting)
    held_out = [entry for entry in entries if entry.name in chosen]
    return held_out, [entry for entry in entries if entry.name not in chosen]


def _mix(entries: list[_Entry]) -> list[_Entry]:
    """Merge the domains so that each advances at the same rate towards its end."""
    totals: dict[str, int] = {}
    for entry in entries:
        totals[entry.domain] = totals.get(entry.domain, 0) + entry.size
    done = dict.fromkeys(totals, 0)
    progress: list[tuple[float, _Entry]] = []
    for entry in entries:
        progress.append(((done[entry.domain] + entry.size / 2) / max(totals[entry.domain], 1), entry))
        done[entry.domain] += entry.size
    return [entry for _, entry in sorted(progress, key=lambda pair: pair[0])]
