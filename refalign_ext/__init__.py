"""RefAlign on Wan2.1: reference-to-video training and generation.

Importing it adds the tasks of `refalign_ext.tasks` to WAN_CONFIGS, and imports no torch.
"""

from contextlib import suppress

from refalign_ext.tasks import register_tasks
from refalign_ext.upstream.own_wan import check_own_wan

# A foreign `wan` is reported by whatever uses it; doctor and patch, which mend it, have to run all the same.
with suppress(ValueError):
    check_own_wan()
    from wan.configs import extend_configs

    extend_configs(register_tasks)
