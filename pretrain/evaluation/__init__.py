"""How good a trained dual encoder is: features, zero-shot classification, retrieval and the report."""
