"""Where do batches come from? Sources, tokenizer, HDF5 shards, order, sampler."""
