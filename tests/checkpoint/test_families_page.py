"""docs/families.md says what tests/checkpoint/test_families.py proves: it is made from the same rows.

`pytest tests/checkpoint/test_families_page.py --write-pages` writes it.
"""

from pathlib import Path

import pytest

from moesaic.checkpoint.families import FAMILIES
from moesaic.config import ModelConfig

from .family_cases import FAMILY_CASES
from .test_families import GRADIENT_FAMILIES, GRADIENT_TOLERANCE, TOLERANCE

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = f"""# Families

The model families of the Hugging Face hub that moesaic loads, runs, trains and writes back, by their `model_type`. No
conversion step, no code from the checkpoint: a family is a table of config keys and tensor names in
`src/moesaic/checkpoint/families/`, and its arithmetic is a choice of `ModelConfig`.

The test run makes this page from its own rows. For each configuration named below, a random model that transformers
saves is loaded here, in float32, and

- logits differ by at most {TOLERANCE:g} where logits have order 1, and every token visits the same experts;
- decoding with the KV cache, and a left-padded batch, give the logits of the full forward pass;
- it is written back tensor for tensor, bit for bit (but for weights of experts that are not there), and transformers
  computes the same from what was written;
- experts are read one tensor each and fused, from shards that they span.

Gradients of all parameters are compared as well, to {GRADIENT_TOLERANCE:g} of the largest entry, for
{", ".join(GRADIENT_FAMILIES)}.

Every key of each config class of transformers is honoured, known to have no effect, or refused by name; a test tries
them all. Other keys are refused unless they are null, false or empty. fp8 (128 x 128 blocks) and mxfp4 weights are
unpacked as they are read, to the type that is asked for.

| Family | Feed-forward | Router | Configurations under test |
|---|---|---|---|
"""


def page() -> str:
    rows = []
    for model_type, family in sorted(FAMILIES.items(), key=lambda item: (not item[1].sparse, item[0])):
        cases = {name: config for name, config in FAMILY_CASES.items() if config.model_type == model_type}
        configs = [family.config_from_hf(config.to_dict()) for config in cases.values()]
        told = [name.removeprefix(model_type).strip() or "plain" for name in cases]
        rows.append(f"| `{model_type}` | {feed_forward(configs)} | {routers(configs)} | {'; '.join(told)} |")
    return HEAD + "\n".join(rows) + "\n"


def feed_forward(configs: list[ModelConfig]) -> str:
    if configs[0].moe is None:
        return "dense"
    shared = any(config.moe and config.moe.shared_intermediate_size for config in configs)
    dense = any(config.num_dense_layers for config in configs)
    return "sparse" + (", shared experts" if shared else "") + (", dense layers" if dense else "")


def routers(configs: list[ModelConfig]) -> str:
    names = sorted({config.moe.router for config in configs if config.moe})
    bias = any(config.moe and config.moe.has_expert_bias for config in configs)
    groups = any(config.moe and config.moe.n_group > 1 for config in configs)
    return ", ".join(names) + (", selection bias" if bias else "") + (", groups" if groups else "") or "-"


def test_the_page_is_what_the_tests_cover(request: pytest.FixtureRequest) -> None:
    if request.config.option.write_pages:
        PAGE.write_text(page(), encoding="utf-8")
    fix = "pytest tests/checkpoint/test_families_page.py --write-pages"
    assert PAGE.read_text(encoding="utf-8") == page(), f"docs/families.md is out of date; run: {fix}"
