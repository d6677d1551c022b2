from .wan_t2v_1_3B import t2v_1_3B
from .wan_t2v_A14B import t2v_A14B

WAN_CONFIGS = {"t2v-1.3B": t2v_1_3B, "t2v-A14B": t2v_A14B}
SIZE_CONFIGS = {"832*480": (832, 480), "480*832": (480, 832)}
SUPPORTED_SIZES = {"t2v-1.3B": ("832*480", "480*832"), "t2v-A14B": ("832*480",)}
