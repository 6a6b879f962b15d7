"""Janus against transformers, on both fixture layouts and on the tiny model's exports."""

import attention_fakes
import iris_kernels
import pytest
import torch
from janus_reference import (
    cached_greedy_codes,
    embed_sequence,
    greedy_codes,
    open_reference,
    packed_hidden,
)

from iris_fast.models.attention import PackedAttention
from iris_fast.models.pretrained.load import load_janus
from iris_fast.models.templates import TEMPLATES, image_prompt_ids
from iris_fast.records import Guidance, PackedBatch

TOLERANCE = 5e-5
PROMPTS = ["a red fox", "two blue squares left of a very large green star", "x"]
SOURCES = [
    pytest.param("original", marks=pytest.mark.shared),
    pytest.param("transformers", marks=pytest.mark.shared),
    "tiny-original",
    "tiny-transformers",
]


@pytest.fixture(scope="module", params=SOURCES)
def pair(request):
    """(our model, transformers' model) of the same weights."""
    if request.param.startswith("tiny"):
        folders = request.getfixturevalue("tiny_folders")
        ours, hf = folders[request.param.removeprefix("tiny-")], folders["transformers"]
    else:
        fixtures = request.getfixturevalue("fixtures")
        names = {"original": "janus_original_tiny", "transformers": "janus_hf_tiny"}
        ours, hf = fixtures / names[request.param], fixtures / names["transformers"]
    return load_janus(ours), open_reference(hf)


@torch.no_grad()
def test_text_logits(pair):
    ours, hf = pair
    ids = torch.randint(0, len(ours.tokenizer), (1, 50))
    expected = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    hidden = packed_hidden(ours.model, [ours.model.embed_text(ids[0])])
    logits = ours.model.text_logits(hidden)
    assert logits.shape == (50, ours.config.decoder.vocab_size)
    assert (logits - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_image_logits(pair):
    ours, hf = pair
    ids = image_prompt_ids(ours.tokenizer, TEMPLATES["janus-pro"], PROMPTS[0])
    codes = torch.randint(0, ours.config.vq.codebook_size, (ours.config.image_tokens,)).tolist()
    rows = embed_sequence(hf, ids, codes)
    expected = hf.model.generation_head(
        hf.model.language_model(inputs_embeds=rows).last_hidden_state[0]
    )
    embeds = torch.cat(
        [ours.model.embed_text(torch.tensor(ids)), ours.model.embed_image(torch.tensor(codes))]
    )
    logits = ours.model.image_logits(packed_hidden(ours.model, [embeds]))
    assert logits.shape == (len(ids) + len(codes), ours.config.vq.codebook_size)
    assert (logits - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_greedy_guided_codes_alone_and_in_a_batch(pair):
    ours, hf = pair
    tokens, weight = ours.config.image_tokens, 5.0
    template, pad = TEMPLATES["janus-pro"], ours.tokenizer.pad_id
    prompts = [image_prompt_ids(ours.tokenizer, template, text) for text in PROMPTS]
    assert len({len(ids) for ids in prompts}) == len(prompts)
    together, together_logits = cached_greedy_codes(ours.model, prompts, pad, tokens, weight)
    for i, ids in enumerate(prompts):
        expected, steps = greedy_codes(hf, ids, pad, tokens, weight)
        alone, alone_logits = cached_greedy_codes(ours.model, [ids], pad, tokens, weight)
        assert alone[0] == expected
        assert together[i] == expected
        # Guidance multiplies the difference of two logits by 5.
        assert (alone_logits[:, 0] - torch.stack(steps)).abs().max() < 10 * TOLERANCE
        assert (together_logits[:, i] - torch.stack(steps)).abs().max() < 10 * TOLERANCE
    assert together[0] != together[1]


def random_pack(config, text_lengths, image_lengths, prompt=3, temperature=1.0) -> PackedBatch:
    """Sequences of `prompt` text tokens, then tokens that are all targets of the row before."""
    ids, is_image, positions, lengths = [], [], [], []
    rows = {False: [], True: []}
    targets = {False: [], True: []}
    for image, length in [(False, n) for n in text_lengths] + [(True, n) for n in image_lengths]:
        size = config.vq.codebook_size if image else config.decoder.vocab_size
        head = torch.randint(0, config.decoder.vocab_size, (prompt,)).tolist()
        body = torch.randint(0, size, (length,)).tolist()
        first = len(ids) + prompt - 1
        rows[image] += range(first, first + length)
        targets[image] += body
        ids += head + body[:-1]
        is_image += [False] * prompt + [image] * (length - 1)
        positions += range(prompt + length - 1)
        lengths.append(prompt + length - 1)
    tensor = torch.tensor
    return PackedBatch(
        token_ids_T=tensor(ids),
        is_image_T=tensor(is_image),
        positions_T=tensor(positions),
        sequence_lengths=lengths,
        text_rows=tensor(rows[False], dtype=torch.int64),
        text_targets=tensor(targets[False], dtype=torch.int64),
        image_rows=tensor(rows[True], dtype=torch.int64),
        image_targets=tensor(targets[True], dtype=torch.int64),
        unconditional_rows=tensor([], dtype=torch.int64),
        guidance=Guidance(temperature=temperature),
    )


def hf_log_probs(hf, packed, temperature):
    """Log-probs of the targets: each sequence alone, all its logits, a gather."""
    text, image, start = [], [], 0
    for length in packed.sequence_lengths:
        part = slice(start, start + length)
        kinds = packed.is_image_T[part]
        ids = packed.token_ids_T[part]
        rows = embed_sequence(hf, ids[~kinds].tolist(), ids[kinds].tolist())
        hidden = hf.model.language_model(inputs_embeds=rows).last_hidden_state[0]
        for found, head, all_rows, targets in (
            (text, hf.lm_head, packed.text_rows, packed.text_targets),
            (image, hf.model.generation_head, packed.image_rows, packed.image_targets),
        ):
            mine = (all_rows >= start) & (all_rows < start + length)
            logits = head(hidden[all_rows[mine] - start]) / temperature
            log_probs = logits.log_softmax(-1)
            found.append(log_probs.gather(-1, targets[mine][:, None])[:, 0])
        start += length
    return torch.cat(text), torch.cat(image)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_training_forward(pair, temperature):
    ours, hf = pair
    lengths = {"text_lengths": [4, 9], "image_lengths": [36, 12]}
    packed = random_pack(ours.config, **lengths, temperature=temperature)
    text, image = ours.model(packed)
    expected_text, expected_image = hf_log_probs(hf, packed, temperature)
    assert (text.logprob - expected_text).abs().max() < TOLERANCE
    assert (image.logprob - expected_image).abs().max() < TOLERANCE
    assert text.entropy.shape == (13,)
    assert image.nsc.shape == (48,)
    assert (image.nsc <= 0).all()


@pytest.mark.parametrize("lengths", [([], [7, 7]), ([6], [])], ids=["no text", "no image"])
def test_training_forward_without_one_modality(tiny, lengths):
    packed = random_pack(tiny.config, *lengths)
    text, image = tiny.model(packed)
    assert len(text.logprob) == sum(lengths[0])
    assert len(image.logprob) == sum(lengths[1])
    tiny.model.zero_grad()
    (text.logprob.sum() + image.logprob.sum() + text.nsc.sum() + image.nsc.sum()).backward()
    weight = tiny.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.grad.abs().max() > 0
    tiny.model.zero_grad()


def test_training_gradients_equal_eager(pair):
    """Every parameter's gradient against transformers' autograd of the same log-probs."""
    ours, hf = pair
    packed = random_pack(ours.config, text_lengths=[5], image_lengths=[8, 3])
    upstream = torch.randn(5), torch.randn(11)
    for model in (ours.model, hf):
        model.zero_grad()
    text, image = ours.model(packed)
    ((text.logprob * upstream[0]).sum() + (image.logprob * upstream[1]).sum()).backward()
    text, image = hf_log_probs(hf, packed, 1.0)
    ((text * upstream[0]).sum() + (image * upstream[1]).sum()).backward()
    expected = {name: p.grad for name, p in hf.named_parameters()}
    pad_row = ours.tokenizer.pad_id
    for name, parameter in ours.model.named_parameters():
        gradient, wanted = parameter.grad, expected[name]
        if "embed_tokens" in name:  # transformers gives its padding row none
            gradient = gradient.clone()
            gradient[pad_row] = wanted[pad_row]
        scale = wanted.abs().max()
        assert scale > 0, name
        assert (gradient - wanted).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "xformers"])
def test_the_chosen_attention_gives_the_same_statistics(tiny, name, monkeypatch):
    packed = random_pack(tiny.config, [6, 2], [9])
    expected = tiny.model(packed)
    calls = attention_fakes.install(name, monkeypatch)
    monkeypatch.setattr(tiny.model, "attn_implementation", name)
    found = tiny.model(packed)
    assert len(calls) == tiny.config.decoder.num_layers
    for ours, theirs in zip(found, expected, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_text_statistics_are_over_the_whole_vocabulary(tiny):
    """Ids that no token has are still columns of the softmax."""
    packed = random_pack(tiny.config, [6], [])
    assert len(tiny.tokenizer) < tiny.config.decoder.vocab_size
    rows = packed.text_rows
    with torch.no_grad():
        text, _ = tiny.model(packed)
        hidden = tiny.model.hidden_states(
            tiny.model.embed_text(packed.token_ids_T), packed.positions_T, PackedAttention([8])
        )
        expected = iris_kernels.token_stats(
            tiny.model.text_logits(hidden[rows]), packed.text_targets
        )
        logits = tiny.model.text_logits(hidden[rows])
    assert torch.equal(text.lse, expected.lse)
    assert (text.lse - logits.logsumexp(-1)).abs().max() < 1e-5


def test_the_pad_row_is_an_ordinary_row(tiny):
    """Unconditional rows are full of pads, whose embedding is trained like any other."""
    packed = random_pack(tiny.config, [6], [])
    ids = packed.token_ids_T.clone()
    ids[1] = tiny.tokenizer.pad_id
    tiny.model.zero_grad()
    text, _ = tiny.model(PackedBatch(**(vars(packed) | {"token_ids_T": ids})))
    text.logprob.sum().backward()
    gradient = tiny.model.model.language_model.embed_tokens.weight.grad
    assert gradient[tiny.tokenizer.pad_id].abs().max() > 0
    tiny.model.zero_grad()


def test_the_text_head_is_not_the_embedding(pair):
    ours, _ = pair
    embedding, head = ours.model.model.language_model.embed_tokens.weight, ours.model.lm_head.weight
    assert embedding.data_ptr() != head.data_ptr()
    assert not torch.equal(embedding, head)


@pytest.mark.shared
def test_bfloat16_stays_bfloat16(fixtures):
    ours = load_janus(fixtures / "janus_original_tiny", dtype=torch.bfloat16)
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    packed = random_pack(ours.config, [4], [9])
    text, image = ours.model(packed)
    assert text.logprob.dtype == image.nsc.dtype == torch.float32
    wide = load_janus(fixtures / "janus_original_tiny").model(packed)
    for narrow, exact in zip((text, image), wide, strict=True):
        assert (narrow.logprob - exact.logprob).abs().max() < 0.15
    assert ours.vq.decode(torch.zeros(1, 36, dtype=torch.int64)).dtype == torch.bfloat16
