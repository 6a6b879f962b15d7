"""The policy: decoder, Janus, its VQ, its checkpoints in both layouts, tokenizer and templates."""
