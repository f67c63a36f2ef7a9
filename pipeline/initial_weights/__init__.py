"""Where a stage takes its first weights from: an earlier stage, another run, an exported model, a file of weights."""
