"""Attention within dilated groups of tokens: `api` is the door, `reference` the truth."""
