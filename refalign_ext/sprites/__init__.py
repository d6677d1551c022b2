"""The embedded world of moving shapes: its clips, its judge, and the training of the embedded model."""
