from easydict import EasyDict

from .shared_config import wan_shared_cfg

t2v_A14B = EasyDict(__name__="Config: a tree like upstream's, two experts")
t2v_A14B.update(wan_shared_cfg)
t2v_A14B.dim = 5120
t2v_A14B.ffn_dim = 13824
t2v_A14B.num_heads = 40
t2v_A14B.num_layers = 40
t2v_A14B.boundary = 0.875
