"""Weights between Megatron's shards and Hugging Face's names: `layout` says where each tensor belongs,
`stream` moves them."""
