"""A run folder, its settings, its stages and the command line."""
