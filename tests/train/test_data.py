import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import moesaic
from moesaic.config import DataConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.tokenizer import byte_tokenizer, train_bpe
from moesaic.train.data import TrainBatches, prepare_data, tokenize_for_evaluation, validation_batches
from moesaic.train.token_file import TokenFile

WORDS = ["router", "expert", "Größe", "日本語", "token", "balance", "load"]


def some_text(size: int) -> str:
    """Paragraphs of random words, some of them not ASCII."""
    text = ""
    while len(text) < size:
        text += " ".join(random.choices(WORDS, k=random.randrange(1, 60))) + random.choice(["\n", "\n\n"])
    return text


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(some_text(300_000))
    return path


def prepare(config, directory, tokens_needed=10**9, sequence_length=32, progress=None):
    return prepare_data(
        config,
        directory,
        tokens_needed=tokens_needed,
        sequence_length=sequence_length,
        progress=progress,
    )


def without_ends(tokens, tokenizer) -> str:
    return tokenizer.decode([int(i) for i in tokens if i != tokenizer.eos_id])


@pytest.mark.parametrize("spec", ["bytes", "bpe:300", "file"])
def test_tokens_are_the_text_and_bytes_are_counted(book, tmp_path, spec):
    if spec == "file":
        train_bpe([some_text(5000)], 280).save(tmp_path / "tokenizer")
        spec = str(tmp_path / "tokenizer")
    data = prepare(DataConfig(source=str(book), tokenizer=spec, validation_fraction=0.1), tmp_path / "data")
    text = book.read_text()
    training = without_ends(data.train.tokens, data.tokenizer)
    held_out = without_ends(data.validation.tokens, data.tokenizer)
    assert training + held_out == text
    assert data.train.text_bytes == len(training.encode())
    assert data.validation.text_bytes == len(held_out.encode())
    assert data.domains == ("book",)
    assert data.train.tokens.dtype == np.dtype("<u2")
    assert data.train.tokens[-1] == data.tokenizer.eos_id
    expected = {"tokenizer.json", "tokenizer_config.json", "train.bin", "validation.bin", "data.json"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == expected


def test_large_vocabularies_are_written_as_four_bytes(book, tmp_path):
    """A tokenizer with ids above 65535, made by adding tokens that the text uses."""
    import tokenizers

    rust = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    rust.add_tokens([f"zz{i}" for i in range(66_000)] + ["router", "load"])
    rust.save(str(tmp_path / "tokenizer.json"))
    data = prepare(DataConfig(source=str(book), tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "data")
    assert data.train.tokens.dtype == np.dtype("<u4")
    assert data.train.tokens.max() > 65_535
    training = without_ends(data.train.tokens, data.tokenizer)
    assert book.read_text().startswith(training)
    assert data.train.text_bytes == len(training.encode())


def test_no_more_is_read_than_the_run_needs(tmp_path):
    lines = [json.dumps({"text": some_text(200)}) + "\n" for _ in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("".join(lines) + "this is not JSON\n")
    config = DataConfig(source=str(tmp_path / "rows.jsonl"))
    data = prepare(config, tmp_path / "data", tokens_needed=50_001)
    assert len(data.train) == 50_001
    assert len(data.validation) >= 8 * 33
    capped = prepare(DataConfig(source=config.source, max_tokens=7000), tmp_path / "capped", tokens_needed=50_001)
    assert len(capped.train) == 7000
    np.testing.assert_array_equal(capped.train.tokens, data.train.tokens[:7000])
    with pytest.raises(UsageError, match="line 20001 is not JSON"):
        prepare(config, tmp_path / "all")


def test_a_source_of_its_own_for_validation(book, tmp_path):
    (tmp_path / "other.txt").write_text(some_text(3000))
    config = DataConfig(source=str(book), validation=str(tmp_path / "other.txt"))
    data = prepare(config, tmp_path / "data")
    assert without_ends(data.train.tokens, data.tokenizer) == book.read_text()
    assert without_ends(data.validation.tokens, data.tokenizer) == (tmp_path / "other.txt").read_text()
    assert data.domains == ("other",)


def test_the_standard_library_with_all_its_domains(tmp_path):
    seen = []
    config = DataConfig(tokenizer="bpe:512")
    needs = {"tokens_needed": 200_000, "sequence_length": 128}
    data = prepare(config, tmp_path / "data", **needs, progress=lambda *event: seen.append(event))
    assert len(data.train) == 200_000
    assert {"modules", "documentation", "data tables"} <= set(data.domains)
    counts = Counter(int(d) for *_, domains in validation_batches(data.validation, 128, 8, 16_384) for d in domains)
    assert sum(counts.values()) == 128
    assert set(counts) == set(range(len(data.domains)))
    assert {label for label, *_ in seen} == {"training the tokenizer", "tokenising"}
    assert seen[-1] == ("tokenising", 200_000, 200_000)
    again = prepare(config, tmp_path / "again", **needs)
    np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
    np.testing.assert_array_equal(again.validation.tokens, data.validation.tokens)


def test_finished_data_is_reused_and_not_read_again(book, tmp_path):
    config = DataConfig(source=str(book))
    first = prepare(config, tmp_path / "data")
    book.unlink()
    second = prepare(config, tmp_path / "data")
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert (first.validation.runs, first.domains) == (second.validation.runs, second.domains)


@pytest.mark.parametrize(
    ("change", "words"),
    [("config", "config"), ("tokens_needed", "number of tokens"), ("tokenizer_file", "tokenizer file")],
)
def test_other_data_is_made_again_and_says_why(book, tmp_path, change, words):
    train_bpe([some_text(5000)], 280).save(tmp_path / "tokenizer")
    config = DataConfig(source=str(book), tokenizer=str(tmp_path / "tokenizer"))
    prepare(config, tmp_path / "data", tokens_needed=5000)
    tokens_needed = 5000
    if change == "config":
        config = DataConfig(source=str(book), tokenizer="bytes")
    elif change == "tokenizer_file":
        train_bpe([some_text(5000)], 290).save(tmp_path / "tokenizer")
    else:
        tokens_needed += 1
    with pytest.warns(UserWarning, match=f"it was made with another {words}"):
        data = prepare(config, tmp_path / "data", tokens_needed=tokens_needed)
    fresh = prepare(config, tmp_path / "fresh", tokens_needed=tokens_needed)
    np.testing.assert_array_equal(data.train.tokens, fresh.train.tokens)
    assert data.tokenizer.to_json() == fresh.tokenizer.to_json()


DAMAGED = ["train.bin", "validation.bin", "tokenizer.json", "tokenizer_config.json", "data.json"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_to_any_file_is_noticed_and_repaired(book, tmp_path, name, damage):
    config = DataConfig(source=str(book))
    good = prepare(config, tmp_path / "data")
    expected = np.array(good.train.tokens), np.array(good.validation.tokens), good.validation.runs
    file = tmp_path / "data" / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        position = random.randrange(len(content))
        content[position] ^= 1 << random.randrange(8)
        file.write_bytes(content if damage == "flip" else content[:position])
    with pytest.warns(UserWarning, match=f"{name} is missing or damaged"):
        repaired = prepare(config, tmp_path / "data")
    np.testing.assert_array_equal(repaired.train.tokens, expected[0])
    np.testing.assert_array_equal(repaired.validation.tokens, expected[1])
    assert repaired.validation.runs == expected[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(config, tmp_path / "data")


def test_a_changed_number_in_the_record_is_noticed(book, tmp_path):
    """Damage that still parses: one bit of a count."""
    config = DataConfig(source=str(book))
    count = prepare(config, tmp_path / "data").validation.text_bytes
    record = (tmp_path / "data" / "data.json").read_text()
    assert f'"text_bytes": {count}' in record
    (tmp_path / "data" / "data.json").write_text(record.replace(f'"text_bytes": {count}', f'"text_bytes": {count ^ 1}'))
    with pytest.warns(UserWarning, match=r"data\.json is missing or damaged"):
        assert prepare(config, tmp_path / "data").validation.text_bytes == count


def test_damaged_data_is_not_replaced_by_other_text(book, tmp_path):
    config = DataConfig(source=str(book))
    prepare(config, tmp_path / "data")
    (tmp_path / "data" / "train.bin").write_bytes(b"damage")
    book.write_text(some_text(300_000))
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(MoesaicError, match=r"has changed .*rm -r"),
    ):
        prepare(config, tmp_path / "data")
    assert (tmp_path / "data" / "train.bin").read_bytes() == b"damage"


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_data(tmp_path):
    """SIGKILL at random moments, most of them inside the writing; afterwards one call finishes the job."""
    (tmp_path / "book.txt").write_text(some_text(3_000_000))
    script = (
        "import sys; from pathlib import Path\n"
        "from moesaic.config import DataConfig\n"
        "from moesaic.train.data import prepare_data\n"
        "print('ready', flush=True)\n"
        "prepare_data(DataConfig(source=sys.argv[1]), Path(sys.argv[2]), tokens_needed=10**9, sequence_length=32,"
        " progress=lambda *event: print(event, flush=True))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(moesaic.__file__).parents[1])}
    for lines_before_kill in (1, 2, 4):
        command = [sys.executable, "-c", script, str(tmp_path / "book.txt"), str(tmp_path / "data")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        for _ in range(lines_before_kill):
            assert process.stdout.readline()
        time.sleep(random.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last kill may have come after the end
        data = prepare(DataConfig(source=str(tmp_path / "book.txt")), tmp_path / "data")
    text = without_ends(data.train.tokens, data.tokenizer) + without_ends(data.validation.tokens, data.tokenizer)
    assert text == (tmp_path / "book.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "data"]


def test_half_a_directory_is_made_again(book, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").write_bytes(b"\1\2\3")
    with pytest.warns(UserWarning, match=r"data\.json is missing"):
        data = prepare(DataConfig(source=str(book)), tmp_path / "data")
    assert book.read_text().startswith(without_ends(data.train.tokens, data.tokenizer))


def test_foreign_files_are_never_deleted(book, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.warns(UserWarning, match="missing"), pytest.raises(UsageError, match=r"holds thesis\.tex"):
        prepare(DataConfig(source=str(book)), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_too_little_text_says_how_much_there_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(UsageError, match=r"a\.txt holds 0 tokens"):
        prepare(DataConfig(source=str(path)), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    path.write_text("tiny")
    with pytest.raises(UsageError, match=r"0 tokens for validation beside 5 for training"):
        prepare(DataConfig(source=str(path)), tmp_path / "data")
    path.write_text("word\n" * 20)
    config = DataConfig(source=str(path), validation_fraction=0.4)
    with pytest.raises(UsageError, match=r"sequence_length is 512, which needs 513 tokens .* holds 66 tokens"):
        prepare(config, tmp_path / "data", sequence_length=512)
    with pytest.raises(UsageError, match=r"held for validation holds 36 tokens"):
        prepare(config, tmp_path / "other", sequence_length=50)
    with pytest.raises(UsageError, match=r"no tokenizer at nowhere\.json"):
        prepare(DataConfig(source=str(path), tokenizer="nowhere.json"), tmp_path / "data")


def token_file(count: int) -> TokenFile:
    return TokenFile(np.arange(count, dtype=np.uint32), 0, ((0, 0),))


def test_every_epoch_visits_every_window_once():
    windows, length, batch_size = random.randrange(3, 40), random.randrange(1, 9), random.randrange(1, 7)
    count = windows * length + 1 + random.randrange(length)
    batches = TrainBatches(token_file(count), length, batch_size, seed=5)
    assert batches.num_windows == windows
    rows = [row for step in range(3 * windows) for row in batches.batch(step)[0].tolist()]
    orders = [[row[0] for row in rows[epoch * windows : (epoch + 1) * windows]] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == [window * length for window in range(windows)]
    if windows > 10:
        assert orders[0] != orders[1] != orders[2]


def test_a_batch_depends_on_seed_and_step_alone():
    data = token_file(5000)
    straight = TrainBatches(data, 16, 24, seed=3)
    expected = [straight.batch(step) for step in range(40)]
    steps = random.sample(range(40), 40)
    resumed = TrainBatches(data, 16, 24, seed=3)
    for step in steps:
        for ours, theirs in zip(resumed.batch(step), expected[step], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(TrainBatches(data, 16, 24, seed=4).batch(0)[0], expected[0][0])


def test_targets_are_the_inputs_one_on():
    tokens, targets = TrainBatches(token_file(500), 16, 4, seed=random.randrange(99)).batch(7)
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)


def test_batches_larger_than_the_data_wrap_around():
    tokens, _ = TrainBatches(token_file(33), 16, 10, seed=0).batch(3)
    assert Counter(tokens[:, 0].tolist()) == {0: 5, 16: 5}
    with pytest.raises(UsageError, match=r"sequence_length is 33, .* holds 33 tokens"):
        TrainBatches(token_file(33), 33, 1, seed=0)


@pytest.mark.parametrize("max_tokens", [1, 64, 320, 10**9])
def test_validation_spreads_over_all_domains(max_tokens):
    sizes = [500, 200, 8, 300]
    owner = np.repeat(np.arange(4), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    data = TokenFile(np.arange(len(owner), dtype=np.uint32), 0, tuple((int(s), d) for d, s in enumerate(starts)))
    batches = list(validation_batches(data, 16, 4, max_tokens))
    tokens, targets, domains = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(targets, tokens + 1)
    assert len(tokens) == min(max(1, max_tokens // 16), 31 + 12 + 0 + 18)
    for row, domain in zip(targets, domains, strict=True):
        assert (owner[row] == int(domain)).all()
        assert owner[row[0] - 1] == int(domain)
    assert len(set(tokens[:, 0].tolist())) == len(tokens)
    if max_tokens == 320:
        assert [int((domains == d).sum()) for d in range(4)] == pytest.approx([10, 4, 0, 6], abs=1)


def test_text_for_evaluation(tmp_path):
    for name in ("alpha", "beta"):
        (tmp_path / f"{name}.txt").write_text(some_text(40_000))
    data, domains = tokenize_for_evaluation(byte_tokenizer(), str(tmp_path))
    assert domains == ("alpha", "beta")
    assert without_ends(data.tokens, byte_tokenizer()) == "".join((tmp_path / f"{d}.txt").read_text() for d in domains)
    assert data.text_bytes == sum((tmp_path / f"{d}.txt").stat().st_size for d in domains)
    assert {int(d) for *_, batch in validation_batches(data, 64, 4, 10**9) for d in batch} == {0, 1}
    with pytest.raises(UsageError, match="no data at"):
        tokenize_for_evaluation(byte_tokenizer(), str(tmp_path / "nowhere"))
