"""Benchmarks: one script for each question, results as JSON with a page beside it."""
