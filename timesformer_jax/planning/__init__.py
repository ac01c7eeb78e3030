"""What a recipe needs of hardware that is not there: memory, time, the largest batch.

The real training step is compiled ahead of time for the devices of a topology. The compiler reports
its memory, FLOPs, memory traffic and collectives; a roofline model estimates its time. For GPUs
that are not present all of this is counted from the config, and the plan says so. TensorFlow is not
needed.
"""

from timesformer_jax.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
