"""`python -m prac_fx.report model.py`: where the memory of a training step goes, why, and what would help.

`cli` is the command. `model_file` runs the user's `build()`, `prac_fx.report.explain` analyses the step, and what it
finds is a *document*: plain data, described in `document`, checked by `reading`. `table`, `html` and `png` draw one,
`compare` sets two side by side.
"""

from prac_fx.document.load import check_document, load_document
from prac_fx.document.schema import SCHEMA, Document
from prac_fx.report.cli import main

__all__ = ["SCHEMA", "Document", "check_document", "load_document", "main"]
