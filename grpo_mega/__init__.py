"""grpo_mega: GRPO for research on losses and adversarial distillation, on megatron-core, from two CPU cores
to a cluster."""

__version__ = "0.1.0"
