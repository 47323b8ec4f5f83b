import ast
import logging
import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from moesaic.errors import MoesaicError
from moesaic.train import stdlib_corpus
from moesaic.train.stdlib_corpus import DATA_TABLES, DOCUMENTATION, MODULES, TESTS

ROOT = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def parts():
    return list(stdlib_corpus.read(0.02))


def sizes(parts) -> Counter:
    total: Counter = Counter()
    for part in parts:
        total[part.domain] += len(part.text.encode())
    return total


def test_texts_are_the_library_s_files_and_none_comes_twice(parts):
    assert len({part.name for part in parts}) == len(parts) > 300
    for part in random.sample(parts, 50):
        if ":" not in part.name:
            assert (ROOT / part.name).read_bytes().decode() == part.text
    names = {part.name for part in parts}
    assert {"json/decoder.py", "os.py"} <= names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


def test_topics_are_texts_of_their_own(parts):
    tree = ast.parse((ROOT / "pydoc_data" / "topics.py").read_text())
    topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    ours = {part.name.partition(":")[2]: part.text for part in parts if part.name.startswith("pydoc_data/topics.py")}
    assert ours == topics
    assert {part.domain for part in parts if ":" in part.name} == {DOCUMENTATION}


def test_hold_out_has_every_domain_and_its_share(parts):
    held_out, everything = sizes(part for part in parts if part.held_out), sizes(parts)
    assert set(held_out) == set(everything) >= {MODULES, DOCUMENTATION, DATA_TABLES}
    for domain, size in held_out.items():
        assert 0.01 < size / everything[domain] < 0.101  # small domains hold out up to a tenth
    assert 0.01 < held_out.total() / everything.total() < 0.03


def test_any_prefix_is_the_same_mixture(parts):
    training = [part for part in parts if not part.held_out]
    whole = sizes(training)
    prefix: Counter = Counter()
    checked = 0
    for part in training:
        prefix[part.domain] += len(part.text.encode())
        if prefix.total() > whole.total() / 10:
            checked += 1
            for domain, size in whole.items():
                assert abs(prefix[domain] / prefix.total() - size / whole.total()) < 0.04
    assert checked > 100


def test_two_readings_are_equal(parts):
    assert list(stdlib_corpus.read(0.02)) == parts
    flags = [part.held_out for part in parts]
    assert flags == sorted(flags, reverse=True)  # what is held out comes first


def test_without_hold_out_all_is_training(parts):
    everything = list(stdlib_corpus.read(0.0))
    assert {part.name for part in everything} == {part.name for part in parts}
    assert not any(part.held_out for part in everything)


def test_a_library_without_tests_and_with_bad_files(tmp_path, caplog):
    """As some distributions ship it: no tests, no topics; and a file that is not UTF-8, a link to nothing."""
    (tmp_path / "encodings").mkdir()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not ours")
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "bad.py").write_bytes(b"x = 1\n# caf\xe9\n" * 3)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "LICENSE.txt").write_text("free as in speech\n" * 9)
    (tmp_path / "encodings" / "cp437.py").write_text("table\n" * 40)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    for i in range(30):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}\n" * (i + 1))
    with caplog.at_level(logging.INFO, logger="moesaic"):
        parts = list(stdlib_corpus.read(0.1, root=tmp_path))
    domains = {part.name: part.domain for part in parts}
    assert domains.pop("LICENSE.txt") == DOCUMENTATION
    assert domains.pop("encodings/cp437.py") == DATA_TABLES
    assert domains == {f"module{i}.py": MODULES for i in range(30)}
    assert "1 files" in caplog.text
    held_out = [part for part in parts if part.held_out]
    assert {part.domain for part in held_out} == {MODULES}  # a domain of one text keeps it for training


def test_no_library_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(MoesaicError, match=r"no standard library on disk at .*data\.source"):
        list(stdlib_corpus.read(0.02, root=tmp_path))


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("argparse.py", MODULES),
        ("email/architecture.rst", DOCUMENTATION),
        ("idlelib/help.html", DOCUMENTATION),
        ("test/test_os.py", TESTS),
        ("ctypes/test/test_cfuncs.py", TESTS),
        ("idlelib/idle_test/test_text.py", TESTS),
        ("test/decimaltestdata/add.decTest", DATA_TABLES),
        ("test/floating_points.txt", DATA_TABLES),
        ("encodings/cp1252.py", DATA_TABLES),
        ("encodings/utf_8.py", MODULES),
        ("html/entities.py", DATA_TABLES),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", None),
        ("lib-dynload/_json.so", None),
        ("turtledemo/turtle.cfg", None),
    ],
)
def test_domains(name, domain):
    assert stdlib_corpus.domain_of(name) == domain
