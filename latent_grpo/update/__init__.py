"""From a recorded response to new weights: replay, loss, micro-batches, optimizer, and what saves memory."""
