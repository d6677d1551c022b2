"""RefAlign on Wan2.1: reference-to-video training and generation. Importing it adds the r2v tasks to WAN_CONFIGS."""

from contextlib import suppress

# A tree that cannot be used is told by whatever uses it; doctor and patch, which mend it, have to run all the same.
with suppress(ValueError):
    from refalign_ext import backbone as _backbone  # noqa: F401 - registers the tasks
