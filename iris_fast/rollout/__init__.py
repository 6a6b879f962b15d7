"""Rollout: from prompts to chains of thought and image codes, KV-cached and guided."""
