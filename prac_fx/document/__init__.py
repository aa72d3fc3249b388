"""The memory report as plain data: it knows no model and compiles nothing."""
