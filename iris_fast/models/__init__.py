"""The policy: decoder, Janus, its VQ, its model folders, tokenizer and templates."""
