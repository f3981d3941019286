"""Faults of megatron-core 0.16.1 where neither Transformer Engine nor Apex is installed. They hit a GPU just
as a CPU, so they are mended everywhere: two in the DistributedOptimizer around torch.optim.AdamW
(tests/parallel/test_checkpoint.py), one in the mixture-of-experts router (tests/parity/test_hf_parity.py).
"""

from __future__ import annotations

from typing import Any

import megatron.core.transformer.moe.moe_utils as moe_utils
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def apply() -> None:
    _restore_step_of_each_parameter()
    _give_each_parameter_its_own_step()
    _let_router_find_no_transformer_engine()


def _restore_step_of_each_parameter() -> None:
    """Loading a `fully_reshardable` checkpoint indexes the saved tensors with every key of the optimizer's
    state, `step` among them, which is not saved per parameter: KeyError."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[parameter]
        step = {"step": state["step"]} if "step" in state else {}
        original(self, model_param, {**step, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states  # type: ignore[method-assign]


def _give_each_parameter_its_own_step() -> None:
    """After a load all parameters share ONE step tensor, so that each update advances it once per parameter
    and the bias correction of Adam is silently wrong."""
    original = DistributedOptimizer.load_state_dict

    def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _let_router_find_no_transformer_engine() -> None:
    """The router asks whether this name is None, but it is only defined when Transformer Engine is there:
    NameError."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
