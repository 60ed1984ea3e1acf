"""Towers, the dual encoder, text packing and the masked-latent parts."""
