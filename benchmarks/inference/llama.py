"""llama.cpp through its low-level interface: tokens in, logits and seconds out.

B sequences, L positions, V vocabulary.
"""

import ctypes
import importlib
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

llama_cpp: Any = importlib.import_module("llama_cpp")  # not everybody who checks this code has it

ERROR_LEVEL = 4
"""Of ggml's log."""
_errors: deque[str] = deque(maxlen=10)


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level == ERROR_LEVEL:
        _errors.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p())  # it would fill the screen


def failure(what: str) -> RuntimeError:
    """With what llama.cpp said last."""
    return RuntimeError("; ".join((what, *_errors)))


class LlamaModel:
    """A GGUF file, loaded as llama.cpp loads it by itself: mapped, and repacked for this CPU where it knows how.

    Keys and values are cached in float16, its default, unless `exact` asks for float32 and plain attention.
    """

    def __init__(
        self, path: Path, *, threads: int, capacity: int, sequences: int = 1, all_logits: bool = False,
        exact: bool = False, repack: bool = True, lazy: bool = False,
    ) -> None:  # fmt: skip
        """Room for `capacity` tokens of each of so many sequences; `all_logits`: of every position, not of the last.

        Without `repack` the weights stay where they are mapped, which takes no memory of its own; `lazy` reads rows of
        tensors only when they are asked for, where the architecture allows it.
        """
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = repack
        if lazy:
            how.lazy_mode = llama_cpp.llama_cpp.LLAMA_LAZY_MODE_ON
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), how)
        if not self._model:
            raise failure(f"llama.cpp cannot load {path}")
        tokens = capacity * sequences
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = tokens
        options.n_batch = max(tokens, options.n_ubatch)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        if all_logits:
            options.n_outputs_max = options.n_batch
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise failure(f"llama.cpp cannot make a context of {tokens} tokens")
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def forget(self, length: int = 0) -> None:
        """Keep the first `length` tokens of each sequence."""
        memory = llama_cpp.llama_get_memory(self._context)
        if length == 0:
            llama_cpp.llama_memory_clear(memory, False)
        else:
            llama_cpp.llama_memory_seq_rm(memory, -1, length, -1)

    def decode(self, tokens: NDArray[np.integer], start: int, *, all_logits: bool = False) -> float:
        """Seconds for tokens (B, L) at positions `start` and on; logits of the last of each sequence, or of all."""
        length = tokens.shape[1]
        rows = [
            (token, start + index, sequence, all_logits or index == length - 1)
            for sequence, row in enumerate(tokens.tolist())
            for index, token in enumerate(row)
        ]
        self._fill(rows)
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, self._batch)
        llama_cpp.llama_synchronize(self._context)
        seconds = time.perf_counter() - begin
        if status:
            raise failure(f"llama_decode returned {status}")
        return seconds

    def logits(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """(L,) -> (L, V), each position's."""
        self.forget()
        self.decode(tokens[None], 0, all_logits=True)
        found = llama_cpp.llama_get_logits(self._context)
        address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(len(tokens), self.vocab_size)).copy()

    def _fill(self, rows: Iterable[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        count = 0
        for token, position, sequence, wants_logits in rows:
            batch.token[count] = token
            batch.pos[count] = position
            batch.n_seq_id[count] = 1
            batch.seq_id[count][0] = sequence
            batch.logits[count] = wants_logits
            count += 1
        batch.n_tokens = count
