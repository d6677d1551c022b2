"""Wan2.1-T2V-14B; text-to-image runs the same weights on a single frame."""

from __future__ import annotations

import copy

from .shared_config import wan_shared_cfg

t2v_14B = copy.deepcopy(wan_shared_cfg)
t2v_14B["__name__"] = "Config: Wan T2V 14B"

t2v_14B.dim = 5120
t2v_14B.ffn_dim = 13824
t2v_14B.num_heads = 40
t2v_14B.num_layers = 40

t2i_14B = copy.deepcopy(t2v_14B)
t2i_14B["__name__"] = "Config: Wan T2I 14B"
