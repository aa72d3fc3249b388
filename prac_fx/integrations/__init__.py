"""Lines for the programs that people train with: one file for each.

A file imports its host, and nothing else of this package imports the file. `docs/integrations.md`
has the lines.
"""
