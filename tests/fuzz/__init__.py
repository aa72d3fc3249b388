"""Random training programs, compiled by `backend="prac"` and by plain Inductor: `python -m tests.fuzz`."""
