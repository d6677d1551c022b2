from .attention import flash_attention
from .model import WanModel
from .t5 import T5EncoderModel
from .vae import WanVAE

__all__ = ["T5EncoderModel", "WanModel", "WanVAE", "flash_attention"]
