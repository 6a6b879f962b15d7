"""How the tiny model was pretrained, measured and used for ablations."""
