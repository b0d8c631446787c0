"""The way from a prompt to a recorded response: decoding, caches, sampling, and the record itself."""
