"""Errors, checks of arguments, random numbers, progress, files, versions and devices, for all other folders."""
