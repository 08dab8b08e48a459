"""Models: loading and writing them, the layers of a decoder."""
