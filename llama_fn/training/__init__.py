"""From texts to weights: the loss, the optimizer, the data, one step, and the loop around it."""
