"""Reports: HTML pages, tables and ArviZ files."""
