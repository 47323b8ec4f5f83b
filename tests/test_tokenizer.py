import json
import random
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
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_as_transformers_renders_it(add_generation_prompt, tmp_path):
    BPE.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    ours = load_tokenizer(tmp_path).apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours == theirs
    assert ours.count("<|im_start|>") == 2 + add_generation_prompt


def test_without_a_template_chat_is_plain_lines():
    assert BYTES.apply_chat_template(MESSAGES) == "user: hi <b>\nassistant: yo\nassistant:"
    assert BYTES.apply_chat_template(MESSAGES, add_generation_prompt=False) == "user: hi <b>\nassistant: yo\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('only one user, please') }}",
        "{{ messages[7].content }}",
        "{% if %}",
    ],
)
def test_hostile_and_broken_templates_are_refused(template):
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(BPE.to_json()), {"chat_template": template})
    with pytest.raises(UsageError, match="chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_named_templates_use_the_default_one():
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(BPE.to_json()), {"chat_template": templates})
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.has_chat_template
    assert not BPE.has_chat_template


def test_added_tokens_of_a_byte_tokenizer_are_used():
    rust = tokenizers.Tokenizer.from_str(BYTES.to_json())
    rust.add_tokens(["router"])
    tokenizer = Tokenizer(rust)
    assert tokenizer.encode_batch(["a router"]) == [tokenizer.encode("a router")] == [[97, 32, 257]]
    assert tokenizer.token_bytes()[257] == 6


def test_half_a_surrogate_pair_is_refused():
    """What Python makes of command-line bytes that are not UTF-8."""
    for tokenizer in (BYTES, BPE):
        with pytest.raises(UsageError, match=r"character 2 .*UTF-8"):
            tokenizer.encode("ab\udce9")


def test_texts_are_read_lazily_by_training():
    endless = iter(lambda: CORPUS[0], None)
    assert train_bpe(islice(endless, 3), 300).vocab_size == 300
