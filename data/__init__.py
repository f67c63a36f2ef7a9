"""WebDataset shards, from storage to augmented micro-batches; knows neither models nor pipeline nor jobs."""
