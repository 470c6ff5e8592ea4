"""What the scripts stand on; see the table in README.md. Imports maskrl, never the other way."""
