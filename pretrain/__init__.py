"""Pretraining of dermatology vision-language models, from shards to an evaluated, exported checkpoint."""
