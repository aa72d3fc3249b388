"""`python -m prac_fx.report model.py`: where the memory of a step goes, why, and what would help.

`cli` is the command. `model_file` runs the user's `build()`, and `explain` analyses the step. The
result is a *document*: plain data, described in `prac_fx.document.schema` and checked by
`prac_fx.document.load`. `table`, `html` and `png` draw one, `compare` sets two side by side.
"""

from prac_fx.document.load import check_document, load_document
from prac_fx.document.schema import SCHEMA, Document
from prac_fx.report.cli import main

__all__ = ["SCHEMA", "Document", "check_document", "load_document", "main"]
