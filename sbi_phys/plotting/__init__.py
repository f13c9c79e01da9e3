"""Figures: functions that take a result and return matplotlib Axes or Figures."""
