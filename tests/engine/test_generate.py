"""Generation against a loop of full forward passes."""

from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic.config import ModelConfig, MoEConfig, SamplingConfig
from moesaic.engine.generate import Generation, stream
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
)


def make_model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    return model


def test_greedy_text_equals_a_loop_of_full_forward_passes() -> None:
    model, ids = make_model(), TOKENIZER.encode("many small experts")
    generation = Generation(prompt_tokens=0)
    text = "".join(stream(model, TOKENIZER, ids, SamplingConfig(max_tokens=12, temperature=0), generation))
    expected = list(ids)
    for _ in range(12):
        token = int(model(torch.tensor([expected]))[0, -1].argmax())
        if token == TOKENIZER.eos_id:
            break
        expected.append(token)
    assert generation.token_ids == expected[len(ids) :]
    assert text == generation.text == TOKENIZER.decode(generation.token_ids)
    assert generation.prompt_tokens == len(ids)


def test_the_end_of_sequence_token_ends_the_text_and_is_not_part_of_it() -> None:
    model, prompt = make_model(), "abc"
    first = int(model(torch.tensor([TOKENIZER.encode(prompt)]))[0, -1].argmax())
    ending = Transformer(replace(CONFIG, eos_token_ids=(first,)))
    ending.load_state_dict(model.state_dict())
    assert moesaic.generate(ending, TOKENIZER, prompt, temperature=0, max_tokens=5) == ""


def test_the_same_seed_gives_the_same_text() -> None:
    model = make_model()
    texts = [moesaic.generate(model, TOKENIZER, "x", max_tokens=30, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_too_long_and_empty_prompts_are_refused_with_the_numbers() -> None:
    model = make_model()
    with pytest.raises(
        UsageError, match=r"has 60 tokens and --max-tokens is 10, .* 64 positions; lower --max-tokens to 4"
    ):
        moesaic.generate(model, TOKENIZER, "x" * 60, max_tokens=10)
    with pytest.raises(UsageError, match="shorten the prompt"):
        moesaic.generate(model, TOKENIZER, "x" * 70, max_tokens=10)
    with pytest.raises(UsageError, match="prompt is empty"):
        moesaic.generate(model, TOKENIZER, "")


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_routers_that_look_ahead_generate_only_when_asked_and_then_from_the_whole_text(router: str) -> None:
    assert CONFIG.moe is not None
    model, prompt = make_model(replace(CONFIG, moe=replace(CONFIG.moe, router=router))).train(), "many small"  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"router {router} .* --allow-lookahead"):
        moesaic.generate(model, TOKENIZER, prompt)
    text = moesaic.generate(model, TOKENIZER, prompt, max_tokens=8, temperature=0, allow_lookahead=True)
    assert model.training
    model.eval()
    ids = TOKENIZER.encode(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            ids.pop()
            break
    assert text == TOKENIZER.decode(ids[len(TOKENIZER.encode(prompt)) :])


def test_a_model_in_training_generates_without_noise_and_drops_nothing() -> None:
    assert CONFIG.moe is not None
    moe = replace(CONFIG.moe, capacity_factor=0.3, router_input_jitter=0.9)
    model = make_model(replace(CONFIG, moe=moe))
    texts = [
        moesaic.generate(model.train(mode), TOKENIZER, "abcdef", max_tokens=20, temperature=0) for mode in (True, False)
    ]
    assert texts[0] == texts[1]
