"""What a client does alone: batches, loss, gradients and the optimiser."""
