"""Models: configuration and weights of a checkpoint, put together from the libraries."""
