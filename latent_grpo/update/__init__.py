"""From recorded responses to new weights: replay, loss, micro-batches, optimizer, and options that save memory."""
