"""DeepSpeed ZeRO: the engine and the state it shards; DeepSpeed and its internals are used here and nowhere else."""
