"""The reference of the model tests: transformers, in plain loops without a cache."""

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from iris_fast.models.attention import PackedAttention
from iris_fast.models.janus import Janus
from iris_fast.rollout.kv_cache import KVCache


def open_reference(folder) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def embed_sequence(hf: JanusForConditionalGeneration, ids: list[int], codes: list[int]) -> Tensor:
    text = hf.get_input_embeddings()(torch.tensor([ids]))
    if not codes:
        return text
    image = hf.prepare_embeddings_for_image_generation(torch.tensor([codes]))
    return torch.cat([text, image], dim=1)


def greedy_codes(
    hf: JanusForConditionalGeneration, ids: list[int], pad: int, tokens: int, weight: float
) -> tuple[list[int], list[Tensor]]:
    """Greedy guided image tokens of one prompt, and the guided logits of every step."""
    unconditional = [ids[0], *[pad] * (len(ids) - 2), ids[-1]]
    codes: list[int] = []
    steps = []
    for _ in range(tokens):
        rows = torch.cat([embed_sequence(hf, row, codes) for row in (ids, unconditional)])
        positions = torch.arange(rows.shape[1])[None]
        hidden = hf.model.language_model(
            inputs_embeds=rows, position_ids=positions, use_cache=False
        ).last_hidden_state[:, -1]
        cond, uncond = hf.model.generation_head(hidden)
        guided = uncond + weight * (cond - uncond)
        codes.append(int(guided.argmax()))
        steps.append(guided)
    return codes, steps


def cached_greedy_codes(
    model: Janus, prompts: list[list[int]], pad: int, tokens: int, weight: float
) -> tuple[list[list[int]], Tensor]:
    """The same for a batch of prompts through one KVCache; guided logits [step, prompt, K]."""
    rows = prompts + [[ids[0], *[pad] * (len(ids) - 2), ids[-1]] for ids in prompts]
    lengths = [len(row) for row in rows]
    cache = KVCache(model.config.decoder, len(rows), max(lengths) + tokens)
    hidden = model.hidden_states(
        model.embed_text(torch.tensor([token for row in rows for token in row])),
        torch.cat([torch.arange(length) for length in lengths]),
        cache.prefill_attention(lengths),
    )[torch.tensor(lengths).cumsum(0) - 1]
    codes, steps = [], []
    for _ in range(tokens):
        cond, uncond = model.image_logits(hidden).chunk(2)
        guided = uncond + weight * (cond - uncond)
        sampled = guided.argmax(-1)
        codes.append(sampled)
        steps.append(guided)
        hidden = model.hidden_states(
            model.embed_image(sampled.repeat(2)), cache.lengths_B, cache.decode_attention()
        )
        cache.advance()
    return torch.stack(codes, 1).tolist(), torch.stack(steps)


def packed_hidden(model: Janus, embeds: list[Tensor]) -> Tensor:
    """Hidden rows of sequences of embeddings [length, D], packed in one batch."""
    lengths = [len(rows) for rows in embeds]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.hidden_states(torch.cat(embeds), positions, PackedAttention(lengths))
