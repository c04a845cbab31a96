"""The encoder and its parts: backbones, heads, batch normalisation."""
