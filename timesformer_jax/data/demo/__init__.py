"""The embedded data sets: real videos, drawn from photographs and encoded here."""
