import io
import random

import numpy as np

from moesaic.tokenizer import byte_tokenizer, train_bpe
from moesaic.train.sources import Document
from moesaic.train.token_file import TokenFile, TokensByDomain, TokenWriter, batches_of_text, encode_documents, id_type


def random_documents(count: int) -> list[Document]:
    texts = ["".join(random.choices("ab é\n日", k=random.randrange(1, 80))) for _ in range(count)]
    return [Document(text, random.choice("xyz"), f"{i}") for i, text in enumerate(texts)]


def test_windows_stay_inside_their_domain():
    lengths = [random.randrange(0, 40) for _ in range(8)]
    starts = np.cumsum([0, *lengths])
    owner = np.repeat(np.arange(8), lengths)
    length = random.randrange(1, 9)
    token_file = TokenFile(np.arange(len(owner)), 0, tuple((int(s), d) for d, s in enumerate(starts[:-1])))
    windows = token_file.windows(length)
    for start, domain in windows:
        assert (owner[start : start + length + 1] == domain).all()
        assert start + length < len(owner)
    for domain, size in enumerate(lengths):
        assert sum(d == domain for _, d in windows) == max(0, (size - 1) // length)


def test_writer_stops_at_its_limit_and_counts_the_bytes_it_wrote():
    tokenizer = train_bpe(["ab ab ab é日 é日" * 9], 270)
    documents = random_documents(30)
    pieces = list(encode_documents(tokenizer, documents))
    everything = np.concatenate(pieces)
    limit = random.randrange(1, len(everything) + 50)
    file = io.BytesIO()
    writer = TokenWriter(file, tokenizer, limit)
    for piece in pieces:
        writer.add(piece)
    written = np.frombuffer(file.getvalue(), "<u2")
    np.testing.assert_array_equal(written, everything[:limit])
    assert (writer.count, writer.is_full) == (len(written), limit <= len(everything))
    sizes = tokenizer.token_bytes()
    assert writer.text_bytes == sum(sizes[i] for i in written)


def test_documents_end_with_the_end_of_text():
    tokenizer = byte_tokenizer()
    for document, ids in zip(documents := random_documents(9), encode_documents(tokenizer, documents), strict=True):
        assert ids.tolist() == [*document.text.encode(), 256]


def test_domains_are_grouped_and_nothing_is_lost():
    tokenizer = byte_tokenizer()
    documents = random_documents(50)
    collected = TokensByDomain(tokenizer)
    for document, ids in zip(documents, encode_documents(tokenizer, documents), strict=True):
        collected.add(document.domain, ids)
    token_file = collected.token_file()
    ends = [*(start for start, _ in token_file.runs[1:]), len(token_file)]
    for (start, domain_id), end in zip(token_file.runs, ends, strict=True):
        name = collected.domains()[domain_id]
        expected = b"\n\0\n".join(d.text.encode() for d in documents if d.domain == name)
        ours = token_file.tokens[start:end]
        assert bytes(ours[ours != 256].astype(np.uint8)) == expected.replace(b"\n\0\n", b"")
    assert token_file.text_bytes == sum(len(document.text.encode()) for document in documents)
    assert len(token_file) == collected.count == token_file.text_bytes + 50


def test_batches_hold_every_document_in_order():
    documents = [Document("z" * random.randrange(1, 400_000), "x", f"{i}") for i in range(20)]
    batches = list(batches_of_text(documents))
    assert [document for batch in batches for document in batch] == documents
    assert len(batches) > 1
    assert all(sum(len(d.text) for d in batch) >= 2**20 for batch in batches[:-1])


def test_large_vocabularies_need_four_bytes():
    tokenizer = byte_tokenizer()
    assert id_type(tokenizer) == np.dtype("<u2")
    tokenizer.vocab_size = 2**16
    assert id_type(tokenizer) == np.dtype("<u2")
    tokenizer.vocab_size = 2**16 + 1
    assert id_type(tokenizer) == np.dtype("<u4")
