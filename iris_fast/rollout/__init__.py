"""Prompts to samples: chain of thought and image codes, KV-cached and guided."""
