"""The training loop, its state, checkpoints and metrics. `python -m pretrain.train CONFIG` under torchrun."""
