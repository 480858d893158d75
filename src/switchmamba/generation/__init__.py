"""Text from a model: how tokens are chosen, how batches decode, and states that outlive a process."""
