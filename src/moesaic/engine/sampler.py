"""Drawing the next token from logits.

V vocabulary.
"""

import torch
from torch import Tensor

from moesaic.config import SamplingConfig
from moesaic.errors import MoesaicError


class Sampler:
    """Draws tokens for one sequence; the same seed and logits give the same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._generator = torch.Generator(device="cpu").manual_seed(config.seed)

    def draw(self, logits: Tensor) -> int:
        """logits (V,) -> token id. Temperature 0 takes the most likely one. Raises MoesaicError for NaN."""
        config = self.config
        logits_V = logits.detach().float().cpu()
        if bool(logits_V.isnan().any()):
            raise MoesaicError("the model's logits are not numbers: its weights are damaged, or overflow its dtype")
        if config.temperature == 0:
            return int(logits_V.argmax())
        logits_V = logits_V / config.temperature
        if 0 < config.top_k < logits_V.numel():
            kth_best = logits_V.topk(config.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < kth_best, -torch.inf)
        probability_V = logits_V.softmax(-1)
        if config.top_p < 1:
            probability_V = _nucleus(probability_V, config.top_p)
        return int(torch.multinomial(probability_V, 1, generator=self._generator))


def _nucleus(probability: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens that hold `top_p` of the mass (arXiv 1904.09751); the best always stays."""
    sorted_V, order_V = probability.sort(descending=True)
    mass_before_V = sorted_V.cumsum(-1) - sorted_V
    kept_V = sorted_V.masked_fill(mass_before_V >= top_p, 0.0)
    kept_V[0] = sorted_V[0]
    return torch.zeros_like(probability).scatter_(0, order_V, kept_V)
