"""What chance decides: which clip, stretch, references and augmentation a position of training shows."""
