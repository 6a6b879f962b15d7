"""Where a run starts: at its newest valid checkpoint, or at step 0."""

import sys

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.lora import Lora
from iris_fast.grpo.update import Learner
from iris_fast.run import checkpoint
from iris_fast.run.checkpoint import Progress
from iris_fast.run.folder import RunFolder


def restore(
    folder: RunFolder, learner: Learner, prompts_sha256: str, config: TrainConfig, ranks: Ranks
) -> Progress:
    """Load the newest valid checkpoint into `learner`; its progress. Step 0 if there is none yet.

    UserError if all checkpoints are damaged, or if this one cannot be resumed with these settings.
    """
    fresh = Progress(prompts_sha256=prompts_sha256, lora=Lora.of(config))
    if not folder.resumed:
        return fresh
    newest = checkpoint.newest(folder.checkpoints) if ranks.is_first else None
    path, faults = ranks.broadcast(newest)
    if ranks.is_first:
        for fault in faults:
            print(f"iris_fast.train: warning: {fault}", file=sys.stderr)
    if path is None:
        if not faults:  # stopped before its first checkpoint
            return fresh
        raise UserError(
            f"resume_from_checkpoint: {folder.checkpoints} holds no valid checkpoint; start a new "
            "run in another --output_dir"
        )
    progress = checkpoint.load(path, learner.policy, learner.optimizer, ranks)
    batches = progress.old_logprobs or []
    if batches and len(batches) != config.gradient_accumulation_steps:
        raise UserError(
            f"resume_from_checkpoint: {path} was saved between two optimizer steps on one rollout, "
            f"split into {len(batches)} micro-batches; resume with --gradient_accumulation_steps "
            f"{len(batches)}"
        )
    if progress.prompts_sha256 != prompts_sha256:
        raise UserError(
            f"prompts: {config.prompts} holds other prompts than when {path} was written; restore "
            "the old file, or start a new run in another --output_dir"
        )
    return progress
