"""`python -m samlight_jax` is the command line `samlight`."""

from samlight_jax.cli import main

main()
