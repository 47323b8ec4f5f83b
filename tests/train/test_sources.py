import json
import random
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError, UsageError
from moesaic.train.sources import MAX_HELD_OUT_BYTES, documents


def some_text(size: int) -> str:
    """Paragraphs of random words, some of them not ASCII."""
    words = ["router", "expert", "Größe", "日本語", "🙂", "x", "token"]
    text = ""
    while len(text) < size:
        text += " ".join(random.choices(words, k=random.randrange(1, 60))) + random.choice(["\n", "\n\n", "\r\n"])
    return text


def split(source, **options):
    found = list(documents(str(source), **options))
    return [d for d in found if not d.held_out], [d for d in found if d.held_out]


def joined(found) -> str:
    return "".join(document.text for document in found)


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3])
def test_a_text_file_is_kept_to_the_byte_and_its_end_is_held_out(tmp_path, fraction):
    text = some_text(200_000)
    (tmp_path / "book.txt").write_bytes(text.encode())
    training, held_out = split(tmp_path / "book.txt", validation_fraction=fraction)
    assert joined(training) + joined(held_out) == text
    assert abs(len(joined(held_out).encode()) / len(text.encode()) - fraction) < 0.005
    assert len(training) > 5
    assert {document.domain for document in training} == {"book"}
    assert max(len(document.text.encode()) for document in training) <= 2**16 + 4
    if held_out and held_out[0].text:
        assert joined(training).endswith("\n")  # cut between lines


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(character=st.sampled_from("aé日🙂"), shift=st.integers(0, 3), fraction=st.sampled_from([0.0, 0.1, 0.49]))
def test_one_endless_line_is_never_cut_inside_a_character(tmp_path, character, shift, fraction):
    text = "x" * shift + character * 70_000
    (tmp_path / "line.txt").write_bytes(text.encode())
    training, held_out = split(tmp_path / "line.txt", validation_fraction=fraction)
    assert joined(training) + joined(held_out) == text
    assert bool(held_out) == (fraction > 0)


def test_the_held_out_part_is_bounded(tmp_path):
    line = b"y" * 999 + b"\n"
    (tmp_path / "big.txt").write_bytes(line * 60_000)
    size = 0
    for document in documents(str(tmp_path / "big.txt"), validation_fraction=0.4):
        if not document.held_out:
            break
        size += len(document.text)
    assert 0.99 * MAX_HELD_OUT_BYTES < size <= MAX_HELD_OUT_BYTES


@pytest.mark.parametrize("offset", [0, 5, 17_000, 65_535, 70_001, 149_999])
def test_bad_utf8_is_named_by_file_and_offset(tmp_path, offset):
    data = bytearray(b"lines of ascii\n" * 10_000)
    data[offset] = 0xFF
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(MoesaicError, match=rf"bad\.txt is not UTF-8 at byte {offset} \(0xff\)") as caught:
        list(documents(str(tmp_path / "bad.txt")))
    assert caught.value.exit_code == 1


def test_a_character_cut_off_by_the_end_is_bad_utf8(tmp_path):
    (tmp_path / "cut.txt").write_bytes(b"a" * 70_000 + "日".encode()[:2])
    with pytest.raises(MoesaicError, match="at byte 70000 "):
        list(documents(str(tmp_path / "cut.txt")))


def test_a_character_broken_where_chunks_meet_is_named_by_its_first_byte(tmp_path):
    (tmp_path / "cut.txt").write_bytes(b"a" * 65_535 + "日".encode()[:1] + b"z" * 70_000)
    with pytest.raises(MoesaicError, match=r"at byte 65535 \(0xe6\)"):
        list(documents(str(tmp_path / "cut.txt")))


def write_records(path, texts, field="text"):
    if path.suffix == ".parquet":
        table = pyarrow.table({field: texts, "n": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps({"n": 1, field: text}) + "\n" for text in texts))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "parquet"])
def test_records_give_their_field(tmp_path, suffix):
    texts = [some_text(random.randrange(1, 300)) for _ in range(50)]
    path = tmp_path / f"rows.{suffix}"
    write_records(path, [*texts, None, ""], field="body")
    found = list(documents(str(path), text_field="body"))
    assert [document.text for document in found] == texts
    assert {document.domain for document in found} == {"rows"}
    assert len({document.name for document in found}) == 50


def test_hold_out_of_records_keeps_its_share_from_the_start(tmp_path):
    write_records(tmp_path / "rows.jsonl", [some_text(random.randrange(1, 400)) for _ in range(2000)])
    seen = held_out = 0
    for number, document in enumerate(documents(str(tmp_path / "rows.jsonl"), validation_fraction=0.05)):
        seen += len(document.text.encode())
        held_out += len(document.text.encode()) * document.held_out
        if number >= 200:
            assert 0.03 < held_out / seen < 0.07


def test_the_held_out_part_of_records_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.train.sources.MAX_HELD_OUT_BYTES", 1000)
    write_records(tmp_path / "rows.jsonl", ["x" * 100] * 300)
    _, held_out = split(tmp_path / "rows.jsonl", validation_fraction=0.4)
    assert len(joined(held_out)) == 1000


def test_a_folder_by_domain(tmp_path):
    texts = {"fables/fox.txt": "a fox", "fables/old/crow.md": "a crow", "law/acts.jsonl": "", "notes.txt": "note"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_records(tmp_path / "law" / "acts.jsonl", ["act one", "act two"])
    write_records(tmp_path / "law" / "lines.json", ["act three"])
    (tmp_path / "law" / "package.json").write_text('{\n "name": "law"\n}')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    found = [(document.domain, document.text) for document in documents(str(tmp_path))]
    assert found == [
        ("fables", "a fox"),
        ("fables", "a crow"),
        ("law", "act one"),
        ("law", "act two"),
        ("law", "act three"),
        ("law", '{\n "name": "law"\n}'),
        ("notes", "note"),
    ]


def test_many_files_at_the_top_of_a_folder_are_one_domain(tmp_path):
    folder = tmp_path / "tales"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(some_text(100))
    training, held_out = split(folder, validation_fraction=0.1)
    assert {document.domain for document in training + held_out} == {"tales"}
    assert 2 <= len(held_out) <= 6


def test_every_domain_of_two_documents_is_in_both_parts(tmp_path):
    for domain in "abc":
        (tmp_path / domain).mkdir()
        for i in range(2):
            (tmp_path / domain / f"{i}.txt").write_text(some_text(100))
    training, held_out = split(tmp_path, validation_fraction=0.02)
    assert Counter(document.domain for document in training) == {"a": 1, "b": 1, "c": 1}
    assert Counter(document.domain for document in held_out) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1, "id": 2}\n', ["a.jsonl line 2", "no field 'text'", "body, id"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', ["a.jsonl line 3 is not JSON"]),
        ("a.jsonl", b'{"text": 5}', ["a.jsonl line 1", "int", "'text'"]),
        ("a.json", b'[{"text": "x"}]', ["line 1 is a JSON list", "jq -c"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl line 1"]),
        ("a.jsonl", b'{"text": "ab\\ud800"}', ["a.jsonl line 1", "surrogate", "character 2"]),
        ("a.parquet", b"PAR1 not really", ["a.parquet cannot be read"]),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoesaicError) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_bad_utf8_in_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(MoesaicError, match=r"a\.jsonl is not UTF-8 at byte 24 \(line 2\)"):
        list(documents(str(tmp_path / "a.jsonl")))


def test_a_parquet_file_without_the_field(tmp_path):
    write_records(tmp_path / "a.parquet", ["x"], field="body")
    with pytest.raises(UsageError, match=r"a\.parquet has no field 'text'; it has body, n"):
        list(documents(str(tmp_path / "a.parquet")))


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(UsageError, match=r"no data at .*nowhere"):
        list(documents(str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match="holds no files"):
        list(documents(str(tmp_path)))
    (tmp_path / "empty.txt").touch()
    assert list(documents(str(tmp_path / "empty.txt"), validation_fraction=0.1)) == []


def test_hub_data_sets_are_streamed(tmp_path):
    """A local folder is a data set to the library too, so this is the real path without a network."""
    for part in ("train", "test"):
        write_records(tmp_path / f"{part}.jsonl", [f"{part} {i}" for i in range(60)])
    training, held_out = split(f"hub:{tmp_path}", validation_fraction=0.1)
    assert sorted(document.text for document in training + held_out) == sorted(f"train {i}" for i in range(60))
    assert 3 <= len(held_out) <= 9
    assert {document.text for document in documents(f"hub:{tmp_path}@test")} == {f"test {i}" for i in range(60)}
    with pytest.raises(UsageError, match=r"row 1 has no field 'body'; it has n, text"):
        next(documents(f"hub:{tmp_path}", text_field="body"))
    with pytest.raises(MoesaicError, match="cannot be read"):
        next(documents(f"hub:{tmp_path}@nosuchsplit"))


@pytest.mark.parametrize(("source", "missing"), [("hub:someone/texts", "datasets"), ("a.parquet", "pyarrow")])
def test_missing_extras_name_the_command(tmp_path, monkeypatch, source, missing):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, module, None)  # what an absent package looks like
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"needs {missing}; install it with: pip install 'moesaic\[data\]'"):
        list(documents(source))


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("first")
    (tmp_path / "a" / "2.txt").write_bytes(b"\xff")
    stream = documents(str(tmp_path / "a"))
    assert next(stream).text == "first"
    with pytest.raises(MoesaicError, match=r"2\.txt"):
        next(stream)
