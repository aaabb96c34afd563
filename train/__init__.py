"""Distillation and evaluation: programs over `samlight_jax`."""
