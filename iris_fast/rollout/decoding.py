"""Text or image tokens being sampled for a batch of sequences: cache, buffers and the step.

With the static engine, the memory that a step reads and writes can be kept: a later batch that fits
starts over in it, and the step that was captured as a CUDA graph is replayed from its first token.

Shapes: B sequences (conditional, then unconditional rows), N samples, L steps, D hidden width, K
codebook entries.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from iris_fast.config import SamplingConfig
from iris_fast.models.attention import rows_and_positions
from iris_fast.models.janus import Janus
from iris_fast.rollout.decode_loop import CapturedStep, StepBuffer, run_steps
from iris_fast.rollout.fused_decoder import FusedDecoder, image_logits
from iris_fast.rollout.kv_cache import KVCache
from iris_fast.rollout.shared_cache import SharedKVCache, SharedPrefixes


class Decoding:
    """Samples one kind of token with one model.

        decoding = Decoding(janus, fused, config, "image", static=True, use_cuda_graph=True)
        decoding.start(sequences, uniforms_NL)
        ids_NL = decoding.run(should_stop)

    `static`: shared prefixes, and steps that could be a graph. `keep`: reuse memory and graph for a
    batch of the same size whose prefixes fit. `greedy`: the most likely tokens.
    """

    def __init__(
        self,
        janus: Janus,
        fused: FusedDecoder,
        config: SamplingConfig,
        stream: Literal["text", "image"],
        *,
        static: bool,
        use_cuda_graph: bool = False,
        keep: bool = False,
        greedy: bool = False,
    ) -> None:
        self._janus, self._fused, self._config, self._stream = janus, fused, config, stream
        self._static, self._use_cuda_graph, self._keep = static, use_cuda_graph, keep and static
        self._temperature = 0.0 if greedy else config.temperature
        self._device = janus.lm_head.weight.device
        self._cache: SharedKVCache | KVCache | None = None
        self._addresses: tuple[int, ...] = ()  # of the weights that a captured step reads

    def start(self, sequences: list[list[int]], uniforms_NL: Tensor) -> None:
        """Run all but the last token of each sequence through the decoder.

        `uniforms_NL`: numbers in [0, 1) for up to L tokens of each of N samples. With B = 2 N,
        sequence N + n guides sequence n, and both receive the same tokens.
        """
        janus, prefixes = self._janus, [ids[:-1] for ids in sequences]
        shared = SharedPrefixes.of(prefixes) if self._static else None
        if not self._restart(shared, len(sequences), uniforms_NL):
            self._allocate(shared, prefixes, uniforms_NL)
        if shared is not None:
            prefixes = shared.prefixes
            attention = self._cache.prefill_attention()
        else:
            attention = self._cache.prefill_attention([len(ids) for ids in prefixes])
        ids_T = torch.tensor([token for ids in prefixes for token in ids], device=self._device)
        _, positions_T = rows_and_positions([len(ids) for ids in prefixes], self._device)
        janus.hidden_states(janus.embed_text(ids_T), positions_T, attention)
        last_B = torch.tensor([ids[-1] for ids in sequences], device=self._device)
        self._embeds_BD.copy_(janus.embed_text(last_B))
        if self._stream == "image":
            self._codes_KD.copy_(self._embed_codes())

    def run(self, should_stop: Callable[[Tensor], bool]) -> Tensor:
        """Sample until L steps are done or `should_stop`, given the ids [N, steps] so far, is True.

        Returns ids [N, steps] on the CPU.
        """

        def stop(steps_done: int) -> bool:
            return should_stop(self.buffer.token_ids_NL[:, :steps_done])

        steps = run_steps(self._step, self.buffer.token_ids_NL.shape[1], stop)
        return self.buffer.token_ids_NL[:, :steps].to("cpu", copy=True)

    def _restart(self, shared: SharedPrefixes | None, batch: int, uniforms_NL: Tensor) -> bool:
        """Start over in the memory of the last batch, if it is kept and fits."""
        if not self._keep or self._cache is None or self._addresses != self._weight_addresses():
            return False
        if len(self._embeds_BD) != batch or self.buffer.token_ids_NL.shape != uniforms_NL.shape:
            return False
        if not self._cache.restart(shared):
            return False
        self.buffer.restart(uniforms_NL)
        return True

    def _allocate(
        self, shared: SharedPrefixes | None, prefixes: list[list[int]], uniforms_NL: Tensor
    ) -> None:
        janus, room, dtype = self._janus, uniforms_NL.shape[1], self._janus.lm_head.weight.dtype
        options = (self._device, janus.attn_implementation)
        self._cache = None  # freed before the new one is allocated
        if shared is not None:
            cache_dtype = torch.float8_e4m3fn if self._config.kv_cache_dtype == "fp8" else dtype
            self._cache = SharedKVCache(
                janus.config.decoder, shared, room, cache_dtype, *options, spare=self._keep
            )
        else:
            slots = max(map(len, prefixes)) + room
            self._cache = KVCache(janus.config.decoder, len(prefixes), slots, dtype, *options)
        self.buffer = StepBuffer(uniforms_NL.to(self._device))
        width = janus.config.decoder.hidden_size
        self._embeds_BD, self._codes_KD = (
            torch.empty(rows, width, dtype=dtype, device=self._device)
            for rows in (len(prefixes), janus.config.vq.codebook_size)
        )
        self._embeds_RND = self._embeds_BD.view(-1, len(uniforms_NL), width)
        self._step = CapturedStep(self._decode, self._use_cuda_graph)
        self._addresses = self._weight_addresses()

    def _decode(self) -> None:
        """One step: the next token of every sample. Given the static engine it neither synchronises
        with the device nor depends on host state."""
        if self._static:
            hidden_BD = self._fused.step(self._embeds_BD, self._cache)
        else:
            step = (self._cache.lengths_B, self._cache.decode_attention())
            hidden_BD = self._janus.hidden_states(self._embeds_BD, *step)
            self._cache.advance()
        is_image = self._stream == "image"
        head = self._janus.model.generation_head
        logits_BV = (
            image_logits(head, hidden_BD) if is_image else self._janus.text_logits(hidden_BD)
        )
        guided = len(logits_BV) > len(self.buffer.token_ids_NL)
        cond, uncond = logits_BV.chunk(2) if guided else (logits_BV, None)
        config = self._config
        token_ids_N = self.buffer.sample(
            cond,
            uncond,
            cfg_weight=config.cfg_weight,
            temperature=self._temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        table = self._codes_KD if is_image else self._janus.model.language_model.embed_tokens.weight
        embeds_ND = F.embedding(token_ids_N, table)
        self._embeds_RND.copy_(embeds_ND)  # both rows of a sample

    def _embed_codes(self) -> Tensor:
        """Every code's embedding [K, D]: a row of it costs a step less than running the aligner."""
        codes_K = torch.arange(self._janus.config.vq.codebook_size, device=self._device)
        return self._janus.embed_image(codes_K)

    def _weight_addresses(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self._janus.parameters())
