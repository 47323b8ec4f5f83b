import json
import random
import resource
import shlex
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.errors import UsageError
from moesaic.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, tokenizer_vocab_size, train_bpe

CORPUS = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py", "scanner.py")]
CORPUS.append("Ünïcode: 日本語のテキスト, emoji 🙂🙃, Ελληνικά. " * 20)

BYTES = byte_tokenizer()
BPE = train_bpe(CORPUS, 600)


def sentencepiece_like() -> Tokenizer:
    """Metaspace words, byte fallback, a dropped first space: how Llama 2 and Mistral tokenizers are built."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "é"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    rust = tokenizers.Tokenizer(model)
    rust.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(rust, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


SENTENCEPIECE = sentencepiece_like()
ALL = pytest.mark.parametrize("tokenizer", [BYTES, BPE, SENTENCEPIECE], ids=["bytes", "bpe", "sentencepiece"])
BYTE_LEVEL = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
ODD_TEXTS = [f"a{END_OF_TEXT}b", "\r\n\t \0", "🙂e\u0301", "  \u2581 x"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(ODD_TEXTS)


@BYTE_LEVEL
@given(text=TEXTS)
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]
    sizes = tokenizer.token_bytes()
    assert sum(sizes[i] for i in ids) == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


@given(text=TEXTS)
def test_byte_ids_are_the_bytes(text):
    assert BYTES.encode(text) == list(text.encode())


@BYTE_LEVEL
@given(data=st.data())
def test_streamed_text_is_the_whole_text(tokenizer, data):
    """Any ids at all: broken UTF-8, special tokens in the middle, an end inside a character."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    assert decoder.flush() == ""


@ALL
@given(text=st.text(st.sampled_from("abc é日🙂\n"), max_size=20))
def test_streamed_pieces_are_never_half_characters(tokenizer, text):
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert "\ufffd" not in "".join(pieces)


def test_special_tokens_in_text_are_text_unless_asked_for():
    for tokenizer in (BYTES, BPE):
        text = f"one{END_OF_TEXT}two"
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0]
        parsed = tokenizer.encode(text, parse_special_tokens=True)
        assert parsed == [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]
        assert tokenizer.decode(parsed) == "onetwo"
        assert tokenizer.eos_id is not None
        assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_threads_do_not_mix_up_how_they_treat_special_tokens():
    wrong = []

    def encode(parse: bool) -> None:
        for _ in range(300):
            if (BPE.eos_id in BPE.encode(f"a{END_OF_TEXT}", parse_special_tokens=parse)) != parse:
                wrong.append(parse)

    threads = [threading.Thread(target=encode, args=(parse,)) for parse in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_bos_comes_from_the_template_and_only_on_request():
    rust = tokenizers.Tokenizer.from_str(SENTENCEPIECE.to_json())
    rust.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(rust, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("ab", add_special_tokens=True) == [1, *tokenizer.encode("ab")]
    assert 1 not in tokenizer.encode("ab")


def test_bytes_of_sentencepiece_tokens():
    sizes = SENTENCEPIECE.token_bytes()
    ids = SENTENCEPIECE.encode("abc é 日")
    assert sum(sizes[i] for i in ids) == len(" abc é 日".encode())  # the space that its normaliser puts first
    assert sizes[1] == sizes[2] == 0


def test_bpe_is_deterministic_and_compresses():
    again = train_bpe(CORPUS, 600)
    assert again.to_json() == BPE.to_json()
    assert BPE.vocab_size == 600
    assert BPE.eos_id == 0
    text = CORPUS[0]
    assert len(BPE.encode(text)) < len(text) / 2


def test_bpe_of_little_text_has_fewer_entries():
    tokenizer = train_bpe(["abc"], 5000)
    assert tokenizer.vocab_size == 257
    assert tokenizer.decode(tokenizer.encode("ÿ never seen 日")) == "ÿ never seen 日"


@pytest.mark.parametrize("reader", [AutoTokenizer, PreTrainedTokenizerFast])
@BYTE_LEVEL
def test_transformers_reads_what_save_wrote(tokenizer, reader, tmp_path):
    tokenizer.save(tmp_path)
    theirs = reader.from_pretrained(str(tmp_path))
    rng = random.Random()
    for text in [CORPUS[3], *("".join(map(chr, rng.choices(range(1, 0xD000), k=50))) for _ in range(5))]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token == END_OF_TEXT
    assert theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size


def test_load_reads_files_directories_and_runs(tmp_path):
    BPE.save(tmp_path / "data")
    for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert loaded.to_json() == BPE.to_json()
        assert loaded.eos_id == BPE.eos_id
    assert tokenizer_vocab_size(str(tmp_path)) == 600
    (tmp_path / "data" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_id == BPE.eos_id


def test_settings_of_a_downloaded_tokenizer_survive_saving(tmp_path):
    source = tmp_path / "source"
    SENTENCEPIECE.save(source)
    settings = {"eos_token": "</s>", "bos_token": "<s>", "model_max_length": 99}
    settings["chat_template"] = "{{ messages[0].content }}"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(source).save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()).items() >= settings.items()
    assert load_tokenizer(tmp_path / "copy").apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_truncation_and_padding_of_a_downloaded_tokenizer_are_switched_off(tmp_path):
    rust = tokenizers.Tokenizer.from_str(BPE.to_json())
    rust.enable_truncation(3)
    rust.enable_padding(length=8)
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a longer text than three")) == "a longer text than three"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"\xff\xfe", None])
def test_unreadable_tokenizers_are_refused_by_name(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=tmp_path.name):
        load_tokenizer(tmp_path)


def test_vocabulary_sizes_of_specs():
    assert tokenizer_vocab_size("bytes") == 257
    assert tokenizer_vocab_size("bpe:2048") == 2048
    for spec in ("bpe:256", "bpe:", "bpe:many"):
        with pytest.raises(UsageError, match="257"):
            tokenizer_vocab_size(spec)
    with pytest.raises(UsageError, match="no tokenizer at nowhere"):
        tokenizer_vocab_size("nowhere")
    with pytest.raises(UsageError, match="256 bytes"):
        train_bpe(["x"], 100)


MESSAGES = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "yo"}]


def test_without_a_template_chat_is_plain_lines():
    assert BYTES.apply_chat_template(MESSAGES) == "user: hi <b>\nassistant: yo\nassistant:"
    assert BYTES.apply_chat_template(MESSAGES, add_generation_prompt=False) == "user: hi <b>\nassistant: yo\n"
    with pytest.raises(UsageError, match="no 'content'"):
        BYTES.apply_chat_template([{"role": "user"}])


def test_named_templates_use_the_default_one():
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(BPE.to_json()), {"chat_template": templates})
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[]) == "tools"
    assert tokenizer.has_chat_template
    assert not BPE.has_chat_template


def test_templates_see_the_special_tokens_as_in_transformers(tmp_path):
    BPE.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True},
        "pad_token": None,
        "add_bos_token": True,
    }
    settings |= {"image_token": "<img>", "extra_special_tokens": {"video_token": "<vid>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = "{{ [bos_token, eos_token, image_token, video_token] }}{{ pad_token is defined }}{{ add_bos_token }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    ours = load_tokenizer(tmp_path).apply_chat_template(MESSAGES)
    assert ours == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)
    assert ours == "['<s>', '<|endoftext|>', '<img>', '<vid>']False"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["<s>", "{{ x }}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "name", "template"]), inner)
    ),
    max_leaves=6,
)
SETTINGS = st.dictionaries(
    st.sampled_from(
        ["eos_token", "bos_token", "pad_token", "chat_template", "extra_special_tokens", "add_bos_token", "my_token"]
    ),
    JSON,
)


@given(content=SETTINGS | JSON)
def test_any_settings_load_or_are_refused_in_one_line(content, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    BPE.save(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    try:
        tokenizer = load_tokenizer(directory)
    except UsageError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert str(directory) in refusal
        assert "\n" not in refusal
        return
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    assert tokenizer.eos_id is None or 0 <= tokenizer.eos_id < tokenizer.vocab_size
    if not tokenizer.has_chat_template:
        assert tokenizer.apply_chat_template(MESSAGES).endswith("assistant:")
    tokenizer.save(directory / "copy")
    assert load_tokenizer(directory / "copy").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**5, "recursion"),
        (b'[["eos_token", "a"]]', "not a JSON object but a list"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"eos_token": 5}', "eos_token is 5; it must be a text"),
        (b'{"bos_token": {"lstrip": true}}', "bos_token is .* with one"),
        (b'{"chat_template": 5}', "chat_template is neither"),
        (b" " * 2**24 + b"{}", "16,777,218 bytes"),
    ],
)
def test_wrong_settings_are_named(content, message, tmp_path):
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [({}, "0 tokens"), ({"a": 2**32 - 1}, "1 tokens with ids up to 4,294,967,295")],
)
def test_vocabularies_without_tokens_or_with_absurd_ids_are_refused(vocabulary, message, tmp_path):
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(json.loads(BPE.to_json()) | {"model": model, "added_tokens": []})
    )
    with pytest.raises(UsageError, match=message):
        load_tokenizer(tmp_path)


def test_a_word_without_an_id_is_one_line():
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>")))
    assert tokenizer.encode("a") == [0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UsageError, match="no ids for"):
            encode("b")


def test_a_huge_tokenizer_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="1,099,511,627,776 bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt"])
def test_older_kinds_of_tokenizers_say_how_to_convert_them(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UsageError, match=rf"has {name} but no tokenizer.json.*save_pretrained.* {tmp_path}$"):
        load_tokenizer(tmp_path)


def test_the_printed_conversion_makes_a_tokenizer(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "##b"])}
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UsageError) as caught:
        load_tokenizer(tmp_path)
    command = shlex.split(str(caught.value).split(" && ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert load_tokenizer(tmp_path).encode("ab a") == [5, 6, 5]


def test_added_tokens_of_a_byte_tokenizer_are_used():
    rust = tokenizers.Tokenizer.from_str(BYTES.to_json())
    rust.add_tokens(["router"])
    tokenizer = Tokenizer(rust)
    assert tokenizer.encode_batch(["a router"]) == [tokenizer.encode("a router")] == [[97, 32, 257]]
    assert tokenizer.token_bytes()[257] == 6


def test_a_full_disk_is_an_oserror_as_for_other_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            BPE.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_half_a_surrogate_pair_is_refused():
    """What Python makes of command-line bytes that are not UTF-8."""
    for tokenizer in (BYTES, BPE):
        with pytest.raises(UsageError, match=r"character 2 .*UTF-8"):
            tokenizer.encode("ab\udce9")


def test_texts_are_read_lazily_by_training():
    endless = iter(lambda: CORPUS[0], None)
    assert train_bpe(islice(endless, 3), 300).vocab_size == 300
