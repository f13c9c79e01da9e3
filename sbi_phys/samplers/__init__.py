"""Samplers: they see a log density and arrays, never a network."""
