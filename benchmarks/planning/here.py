"""This machine: what its measured limits predict for our kernels, beside what they do. For idle machines only."""

import statistics
import time
from dataclasses import dataclass, replace

import torch
from inference.runners import Texts

from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.plan.calibrate import calibrate, calibrated_cluster
from moesaic.plan.cluster import Cluster
from moesaic.plan.inference import InferenceTask, Phase, estimate_inference
from moesaic.plan.layout import Layout
from moesaic.plan.subject import Subject, find_subject

PROMPT, SHORT_PROMPT, STEPS, ROUNDS = 512, 32, 24, 5
LAYERS, VOCABULARY = 2, 16384
"""Of OLMoE-1B-7B's shape, so that its weights are larger than caches and made in seconds."""


@dataclass(frozen=True)
class Here:
    work: str
    predicted: float
    measured: float


def measure_here(formats: tuple[str, ...] = ("int4", "int8")) -> list[Here]:
    """Tokens per second; medians of the rounds."""
    config = replace(find_subject("olmoe-1b-7b").config, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    subject = Subject(name="made up", config=config)
    found: list[Here] = []
    for precision in formats:
        cluster = calibrated_cluster(calibrate())
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.02)
        quantize_model(model, make_quantization(precision, config))
        prefill, decode = _speeds(model.eval())
        for phase, speed in (("prefill", prefill), ("decode", decode)):
            predicted = _predicted(subject, cluster, "prefill" if phase == "prefill" else "decode", precision)
            found.append(Here(f"this machine: {phase}, {precision}", predicted, speed))
    return found


def _predicted(subject: Subject, cluster: Cluster, phase: Phase, precision: str) -> float:
    context = PROMPT if phase == "prefill" else SHORT_PROMPT + STEPS // 2
    # Our int4 keeps in 8 bits what is small.
    task = InferenceTask(phase=phase, context=context, precision=precision, dense_precision="int8")
    return estimate_inference(subject, cluster, Layout(), task).tokens_per_second


@torch.inference_mode()
def _speeds(model: Transformer) -> tuple[float, float]:
    tokens_1L = torch.randint(0, VOCABULARY, (1, PROMPT))
    texts = Texts(model, 1, 2 * PROMPT)
    prefill, decode = [], []
    for _ in range(ROUNDS):
        texts.forget()
        start = time.perf_counter()
        texts.read(tokens_1L)
        prefill.append(PROMPT / (time.perf_counter() - start))
        texts.forget()
        texts.read(tokens_1L[:, :SHORT_PROMPT])
        start = time.perf_counter()
        for index in range(STEPS):
            texts.read(tokens_1L[:, index : index + 1])
        decode.append(STEPS / (time.perf_counter() - start))
    return statistics.median(prefill), statistics.median(decode)
