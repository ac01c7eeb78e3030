"""Imports TensorFlow when it is first needed, and without its messages about the machine."""

from types import ModuleType

from timesformer_jax.tensorflow_messages import hide_tensorflow_messages


def import_prepared() -> ModuleType:
    """Imports and returns `timesformer_jax.data.records.prepared`, and with it TensorFlow."""
    with hide_tensorflow_messages():
        from timesformer_jax.data.records import prepared
    return prepared
