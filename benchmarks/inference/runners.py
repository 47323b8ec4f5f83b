"""The ways to run a model that are compared: ours, llama.cpp's and transformers'. Each is made in its own process.

B sequences, L positions, S steps, P prompt tokens, V vocabulary.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import moesaic
from inference.sides import Tokens
from moesaic.model.paged_kv import NewTokens, PagedKV
from moesaic.model.quantize import KINDS, Quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops.native_step import BLOCK_TOKENS
from moesaic.ops.quantize import DEFAULT_GROUP_SIZE

EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
"""Those of transformers that run on CPUs."""
GATHERED_AT_MOST = 3 * 2**30
"""Bytes of expert weights that batched_mm may copy."""


EVERYWHERE = "int4 everywhere"
"""No scheme of ours, which keep in 8 bits what is small: 4 bits for every matrix that can be packed."""


def int4_everywhere(group_size: int = DEFAULT_GROUP_SIZE) -> Quantization:
    return Quantization("int4", group_size, dict.fromkeys(KINDS, "int4"))


class Texts:
    """B texts that a model reads and writes side by side, with room for `capacity` tokens of each."""

    def __init__(self, model: Transformer, batch: int, capacity: int) -> None:
        blocks = -(-capacity // BLOCK_TOKENS)
        self._model, self._length = model, 0
        self._kv = PagedKV(model.config, batch * blocks, model.norm.weight.dtype, torch.device("cpu"))
        self._blocks = [range(number * blocks, (number + 1) * blocks) for number in range(batch)]

    def forget(self) -> None:
        self._length = 0

    def read(self, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
        """tokens (B, L), which come next -> logits (B, logits_to_keep, V)."""
        batch, new = tokens.shape
        kv = self._kv.batch([NewTokens(blocks, self._length, new) for blocks in self._blocks])
        self._length += new
        last_BK = torch.arange(1, batch + 1)[:, None] * new - torch.arange(logits_to_keep, 0, -1)
        logits_1RV = self._model(
            tokens.reshape(1, -1), kv=kv, logits_to_keep=last_BK.flatten() if new > 1 else None, skip_others=True
        )
        return logits_1RV[0].unflatten(0, (batch, -1))


class Ours:
    """`moesaic.load`, and the model itself: no sampling, no text."""

    def __init__(self, directory: Path, threads: int, *, dtype: str = "auto", quantization: str | None = None) -> None:
        torch.set_num_threads(threads)
        if quantization == EVERYWHERE:
            self.model: Transformer = moesaic.load(directory, device="cpu", dtype=dtype)
            quantize_model(self.model, int4_everywhere())
        else:
            self.model = moesaic.load(directory, device="cpu", dtype=dtype, quantization=quantization)
        self._texts: dict[tuple[int, int], Texts] = {}

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        return self.model(torch.from_numpy(tokens)[None])[0].float().numpy()

    @torch.inference_mode()
    def prefill(self, tokens: Tokens) -> float:
        texts, tokens_1L = self._empty_texts(1, len(tokens)), torch.from_numpy(tokens)[None]
        return _seconds(lambda: texts.read(tokens_1L))

    @torch.inference_mode()
    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        texts = self._empty_texts(len(prompt), prompt.shape[1] + tokens.shape[1])
        texts.read(torch.from_numpy(prompt))
        steps_SB1 = torch.from_numpy(tokens).T.unsqueeze(2)
        return _seconds(lambda: [texts.read(step_B1) for step_B1 in steps_SB1])

    def bytes_per_step(self, batch: int) -> float:
        """Of weights that a step of one token for each of `batch` sequences must read, if experts are chosen evenly."""
        moe = self.model.config.moe
        assert moe is not None
        visited = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
        total = 0.0
        for name, tensor in _tensors(self.model).items():
            if name.startswith("embed_tokens.") and not self.model.config.tie_word_embeddings:
                continue  # a row per token
            share = visited if ".experts." in name else 1.0
            total += share * tensor.numel() * tensor.element_size()
        return total

    def _empty_texts(self, batch: int, capacity: int) -> Texts:
        """Their memory is taken once, as a server does."""
        if (batch, capacity) not in self._texts:
            self._texts[batch, capacity] = Texts(self.model, batch, capacity)
        texts = self._texts[batch, capacity]
        texts.forget()
        return texts


class Llama:
    """A GGUF file in llama.cpp, with room for `capacity` tokens in each sequence."""

    def __init__(
        self,
        path: Path,
        threads: int,
        *,
        capacity: int,
        all_logits: bool = False,
        repack: bool = True,
        lazy: bool = False,
    ) -> None:
        from inference.llama import LlamaModel

        self._models: dict[int, Any] = {}
        self._make = lambda sequences: LlamaModel(
            path,
            threads=threads,
            capacity=capacity,
            sequences=sequences,
            all_logits=all_logits,
            repack=repack,
            lazy=lazy,
        )
        self._model(1)

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        return self._model(1).logits(tokens)

    def prefill(self, tokens: Tokens) -> float:
        model = self._model(1)
        model.forget()
        return model.decode(tokens[None], 0)

    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        model = self._model(len(prompt))
        model.forget()
        model.decode(prompt, 0)
        start = prompt.shape[1]
        return sum(model.decode(tokens[:, step : step + 1], start + step) for step in range(tokens.shape[1]))

    def _model(self, sequences: int) -> Any:
        """Made for so many sequences at once; one such model at a time."""
        if sequences not in self._models:
            for old in self._models.values():
                old.close()
            self._models = {sequences: self._make(sequences)}
        return self._models[sequences]


class Transformers:
    """A Hugging Face directory in transformers, with whichever of its ways to compute experts is fastest here."""

    def __init__(self, directory: Path, threads: int, *, dtype: str) -> None:
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._new_cache = transformers.DynamicCache
        self._fastest: dict[tuple[str, int], str] = {}

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        self._model.set_experts_implementation("grouped_mm")
        return self._model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def prefill(self, tokens: Tokens) -> float:
        tokens_1L = torch.from_numpy(tokens)[None]
        self._use_fastest(("prefill", len(tokens)), lambda: self._pass(tokens_1L, self._new_cache()))
        cache = self._new_cache()
        return _seconds(lambda: self._pass(tokens_1L, cache))

    @torch.inference_mode()
    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        cache = self._new_cache()
        self._model.set_experts_implementation("grouped_mm")
        self._pass(torch.from_numpy(prompt), cache)
        steps_SB1 = torch.from_numpy(tokens).T.unsqueeze(2)

        def trial() -> None:
            self._pass(steps_SB1[0], cache)
            cache.crop(-1)

        self._use_fastest(("decode", len(prompt)), trial)
        return _seconds(lambda: [self._pass(step_B1, cache) for step_B1 in steps_SB1])

    def implementation(self, work: str, tokens: int) -> str:
        """That was found fastest."""
        return self._fastest[work, tokens]

    def _pass(self, tokens: Tensor, cache: Any) -> None:
        self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _use_fastest(self, work: tuple[str, int], trial: Callable[[], object]) -> None:
        if work not in self._fastest:
            seconds = {}
            for name in EXPERTS_IMPLEMENTATIONS:
                if name == "batched_mm" and self._gathered_bytes(work[1]) > GATHERED_AT_MOST:
                    continue
                self._model.set_experts_implementation(name)
                trial()
                seconds[name] = min(_seconds(trial) for _ in range(2))
            self._fastest[work] = min(seconds, key=seconds.__getitem__)
        self._model.set_experts_implementation(self._fastest[work])

    def _gathered_bytes(self, tokens: int) -> int:
        """What batched_mm copies in a layer: for each token the weights of its experts."""
        experts = self._model.model.layers[0].mlp.experts
        per_expert = sum(weight.numel() * weight.element_size() for weight in experts.parameters()) / len(
            experts.gate_up_proj
        )
        return int(tokens * self._model.config.num_experts_per_tok * per_expert)


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
