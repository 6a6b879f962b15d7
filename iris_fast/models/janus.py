"""Janus / Janus-Pro as a policy: one decoder, a text head, an image head.

State-dict names are those of transformers' JanusForConditionalGeneration, without the vision
tower, its aligner (image understanding) and the VQ, none of which the policy runs.

Shapes: T token rows of a packed batch, D hidden width, V text vocabulary, K codebook entries, e
codebook width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from iris_kernels import TokenStats, linear_token_stats
from torch import Tensor, nn

from iris_fast.models.attention import PackedAttention
from iris_fast.models.decoder import AttentionStrategy, Decoder, DecoderConfig
from iris_fast.models.vq import VQConfig
from iris_fast.records import PackedBatch


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the understanding tower, whose weights are not run here, only passed on."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int
    num_positions: int


@dataclass(frozen=True)
class JanusConfig:
    """Everything that the shapes of a Janus model follow from."""

    decoder: DecoderConfig
    vq: VQConfig
    vision: VisionConfig
    image_size: int

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along the side of an image."""
        return self.image_size // self.vq.patch_size

    @property
    def image_tokens(self) -> int:
        """I: tokens of one image, row-major over its grid."""
        return self.tokens_per_side**2


class GenerationAligner(nn.Module):
    """Codebook width e to decoder width D: Linear, GELU, Linear."""

    def __init__(self, codebook_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(codebook_dim, width)
        self.hidden_layers = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., D] of rows [..., e]."""
        return self.hidden_layers[0](F.gelu(self.fc1(x)))


class GenerationHead(nn.Module):
    """Decoder width D to K codebook logits: Linear, GELU, Linear."""

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.proj_out = nn.Linear(width, width)
        self.vision_head = nn.Linear(width, codebook_size)

    def hidden(self, hidden: Tensor) -> Tensor:
        """Input of the last Linear, [..., D], of hidden rows [..., D]."""
        return F.gelu(self.proj_out(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., K] of hidden rows [..., D]."""
        return self.vision_head(self.hidden(hidden))


class JanusCore(nn.Module):
    """What the state dict calls `model`: decoder, image embedding and image head."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        width = config.decoder.hidden_size
        self.language_model = Decoder(config.decoder)
        self.generation_embeddings = nn.Embedding(config.vq.codebook_size, config.vq.codebook_dim)
        self.generation_aligner = GenerationAligner(config.vq.codebook_dim, width)
        self.generation_head = GenerationHead(width, config.vq.codebook_size)


class Janus(nn.Module):
    """The policy, with random weights; `models.pretrained.load.load_janus` opens trained ones.

    `lm_head` is never tied to the token embedding.
    """

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.config = config
        self.attn_implementation = "sdpa"  # one of attention.IMPLEMENTATIONS
        self.model = JanusCore(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Embeddings [..., D] of text ids [...]."""
        return self.model.language_model.embed_tokens(token_ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Embeddings [..., D] of codebook indices [...]."""
        return self.model.generation_aligner(self.model.generation_embeddings(codes))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final-norm hidden rows [..., D]."""
        return self.lm_head(hidden)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., K] of final-norm hidden rows [..., D]."""
        return self.model.generation_head(hidden)

    def hidden_states(
        self, embeds_TD: Tensor, positions_T: Tensor, attention: AttentionStrategy
    ) -> Tensor:
        """Final-norm hidden states [T, D]; see `Decoder.forward`."""
        return self.model.language_model(embeds_TD, positions_T, attention)

    def forward(self, packed: PackedBatch) -> tuple[TokenStats, TokenStats]:
        """Statistics of the text targets and of the image targets of a packed batch.

        Each field is fp32, shaped like `packed.text_targets` or `packed.image_targets`
        (`iris_kernels.token_stats` defines them), of the distributions that `packed.guidance`
        names; either may be empty. Only the rows that predict a target are projected by the heads,
        and their logits are never materialised as a whole. Guidance mixes the inputs of the image
        head's last layer instead of its outputs: that layer is affine and the weights of the mix
        add up to 1, so the logits are the same. All of it happens inside this one call, while FSDP
        has the weights gathered.
        """
        embeds_TD = self.embed_packed(packed)
        lengths, temperature = packed.sequence_lengths, packed.guidance.temperature
        attention = PackedAttention(lengths, embeds_TD.device, self.attn_implementation)
        hidden_TD = self.hidden_states(embeds_TD, packed.positions_T, attention)
        text = linear_token_stats(
            hidden_TD.index_select(0, packed.text_rows),
            self.lm_head.weight,
            packed.text_targets,
            temperature=temperature,
        )
        head = self.model.generation_head.vision_head
        rows, targets = self._image_head_input(hidden_TD, packed), packed.image_targets
        image = linear_token_stats(rows, head.weight, targets, head.bias, temperature=temperature)
        return text, image

    def _image_head_input(self, hidden_TD: Tensor, packed: PackedBatch) -> Tensor:
        head = self.model.generation_head
        cond = head.hidden(hidden_TD.index_select(0, packed.image_rows))
        if not len(packed.unconditional_rows):
            return cond
        uncond = head.hidden(hidden_TD.index_select(0, packed.unconditional_rows)).float()
        return (uncond + packed.guidance.cfg_weight * (cond.float() - uncond)).to(cond.dtype)

    def embed_packed(self, packed: PackedBatch) -> Tensor:
        """Embeddings [T, D] of the text and image tokens of a packed batch."""
        # Both embeddings run on all rows, then `where` selects: counting the rows of one kind needs
        # a synchronisation, and the aligner is 0.3% of the decoder's work.
        is_image_T = packed.is_image_T
        text = self.embed_text(packed.token_ids_T.masked_fill(is_image_T, 0))
        image = self.embed_image(packed.token_ids_T.masked_fill(~is_image_T, 0))
        return torch.where(is_image_T[:, None], image, text)
