"""The embedded default: a small world of coloured shapes and a Janus to draw it."""

from iris_fast.tiny.build import MODEL_FOLDER, build_random_tiny, build_tiny
from iris_fast.tiny.captions import HELD_OUT_FILE, PROMPTS_FILE

__all__ = ["HELD_OUT_FILE", "MODEL_FOLDER", "PROMPTS_FILE", "build_random_tiny", "build_tiny"]
