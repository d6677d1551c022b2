"""RefAlign on Wan2.1: reference-to-video training and generation. Importing it adds the r2v tasks to WAN_CONFIGS."""

from refalign_ext import backbone as _backbone  # noqa: F401 - registers the tasks
