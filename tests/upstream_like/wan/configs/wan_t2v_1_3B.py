from easydict import EasyDict

from .shared_config import wan_shared_cfg

t2v_1_3B = EasyDict(__name__="Config: a tree like upstream's, 1.3B")
t2v_1_3B.update(wan_shared_cfg)
t2v_1_3B.dim = 1536
t2v_1_3B.ffn_dim = 8960
t2v_1_3B.num_heads = 12
t2v_1_3B.num_layers = 30
