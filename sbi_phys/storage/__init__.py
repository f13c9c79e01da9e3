"""What keeps a store whole over years: its manifest and index, checks and repair, merging, parts, import, upgrades, watching."""
