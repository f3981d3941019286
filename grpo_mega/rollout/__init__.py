"""Where samples come from. `local`: a transformers model inside the trainer."""
