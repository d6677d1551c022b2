"""Generates a video or an image from a prompt, and from reference images with the r2v tasks.

python generate.py --task r2v-tiny --ref a.png b.png --prompt "..."
torchrun --nproc_per_node=8 generate.py --task r2v-14B --dit_fsdp --t5_fsdp ...
"""

import sys

from refalign_ext.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
