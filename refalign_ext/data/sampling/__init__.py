"""Random sampling: which clip, frames, references and augmentation a position of training shows."""
