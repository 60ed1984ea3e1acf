"""Captions into aspect-labelled sub-captions: by rules, or by a language model whose answers are checked."""
