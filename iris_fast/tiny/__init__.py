"""The built-in default: a synthetic world of coloured shapes and a tiny Janus trained on it."""

from iris_fast.tiny.build import MODEL_FOLDER, build_random_tiny, build_tiny
from iris_fast.tiny.captions import HELD_OUT_FILE, PROMPTS_FILE

__all__ = ["HELD_OUT_FILE", "MODEL_FOLDER", "PROMPTS_FILE", "build_random_tiny", "build_tiny"]
