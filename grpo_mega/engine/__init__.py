"""Megatron-core behind names: parallel groups, model, train step, optimizer, checkpoint.

Importing this package prepares megatron-core for the device at hand, once, before any of its modules is used.
"""

from grpo_mega.engine.device import prepare_megatron

prepare_megatron()
