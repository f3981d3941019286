"""Where prompts come from: tokenizers, sources of problems, and the stateless stream that orders them."""
