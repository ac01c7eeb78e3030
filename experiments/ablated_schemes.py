"""Registers the attention schemes of the ablations in `paper_tables`; for TIMESFORMER_IMPORT."""

from timesformer_jax.models.schemes import SPATIAL, TEMPORAL, Scheme, register_scheme

register_scheme("no_temporal_fc", Scheme((TEMPORAL._replace(has_temporal_fc=False), SPATIAL)))
register_scheme("half_width_time", Scheme((TEMPORAL._replace(width=0.5), SPATIAL)))
register_scheme("token_in_time", Scheme((TEMPORAL._replace(joins_cls=True), SPATIAL)))
register_scheme("time_in_every_second", Scheme((TEMPORAL._replace(every=2), SPATIAL)))
register_scheme("space_in_every_second", Scheme((TEMPORAL, SPATIAL._replace(every=2))))
