"""The embedded default: a small world of coloured shapes and a Janus to draw it."""

from iris_fast.tiny.build import PROMPTS_FILE, build_tiny

__all__ = ["PROMPTS_FILE", "build_tiny"]
