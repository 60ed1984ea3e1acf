"""Losses: pure functions of tensors, tested against float64 loops in tests/reference."""
