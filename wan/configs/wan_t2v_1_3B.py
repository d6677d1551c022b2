"""Wan2.1-T2V-1.3B."""

from __future__ import annotations

import copy

from .shared_config import wan_shared_cfg

t2v_1_3B = copy.deepcopy(wan_shared_cfg)
t2v_1_3B["__name__"] = "Config: Wan T2V 1.3B"

t2v_1_3B.dim = 1536
t2v_1_3B.ffn_dim = 8960
t2v_1_3B.num_heads = 12
t2v_1_3B.num_layers = 30
