import a_video_reader_that_nobody_has  # noqa: F401 - pipelines bring dependencies that references have no use for

from . import configs, modules  # noqa: F401
