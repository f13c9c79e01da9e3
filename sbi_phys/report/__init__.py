"""What a reader sees: figures, tables, the ArviZ file and the HTML report. Import the module you need; each is light until used."""
