"""Rollout -> PackedBatch: the training sequences laid end to end, and the sample of each token."""

import torch
from torch import Tensor

from iris_fast.records import CONDITIONAL, Guidance, PackedBatch, Rollout


def pack(rollout: Rollout, guidance: Guidance = CONDITIONAL) -> tuple[PackedBatch, Tensor]:
    """Pack the text and image sequences of a rollout; the packed batch, and `sample_M`.

    Each sample gives the sequences [CoT prompt, CoT] (if it has one) and [image prompt, codes],
    without the last token, which predicts nothing. M, the trained tokens, counts the text rows of
    all samples first, then the image rows; `sample_M` [M] int64 is the sample of each token.

    With guidance a sample also gives [unconditional prompt, codes], whose rows guide the image's.
    """
    ids: list[int] = []
    is_image: list[bool] = []
    lengths: list[int] = []
    rows: dict[str, list[int]] = {"text": [], "image": [], "unconditional": []}
    targets: dict[str, list[int]] = {"text": [], "image": []}
    samples: dict[str, list[int]] = {"text": [], "image": []}

    def append(kind: str, sample: int, prompt: list[int], completion: list[int]) -> None:
        first_row = len(ids) + len(prompt) - 1
        rows[kind].extend(range(first_row, first_row + len(completion)))
        if kind in targets:
            targets[kind].extend(completion)
            samples[kind].extend([sample] * len(completion))
        ids.extend(prompt + completion[:-1])
        is_image.extend([False] * len(prompt) + [kind != "text"] * (len(completion) - 1))
        lengths.append(len(prompt) + len(completion) - 1)

    for sample, codes in enumerate(rollout.codes_NI.tolist()):
        if rollout.cot_ids[sample]:
            append("text", sample, rollout.cot_prompt_ids[sample], rollout.cot_ids[sample])
        append("image", sample, rollout.image_prompt_ids[sample], codes)
        if guidance.cfg_weight != 1:
            append("unconditional", sample, rollout.unconditional_prompt_ids[sample], codes)
    packed = PackedBatch(
        token_ids_T=torch.tensor(ids),
        is_image_T=torch.tensor(is_image),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        sequence_lengths=lengths,
        text_rows=torch.tensor(rows["text"], dtype=torch.int64),
        text_targets=torch.tensor(targets["text"], dtype=torch.int64),
        image_rows=torch.tensor(rows["image"], dtype=torch.int64),
        image_targets=torch.tensor(targets["image"], dtype=torch.int64),
        unconditional_rows=torch.tensor(rows["unconditional"], dtype=torch.int64),
        guidance=guidance,
    )
    return packed, torch.tensor(samples["text"] + samples["image"])
