"""What a run asks of a cluster and its storage, by the number of its ranks, and what reaches its limit first."""
