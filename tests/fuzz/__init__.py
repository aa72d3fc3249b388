"""Random training programs, compiled by prac and by plain Inductor: `python -m tests.fuzz`."""
