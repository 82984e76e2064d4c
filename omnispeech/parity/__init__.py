"""This implementation against golden numbers of the originals."""
