"""`python -m timesformer_jax.cli`, the same as `timesformer`."""

from timesformer_jax.cli.main import main

main()
