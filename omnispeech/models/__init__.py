"""One network per file, attribute names as in the checkpoint."""
