"""Ranks that compute the same micro-batch must get equal bits: what is compared, and who is wrong if they do not."""
