"""`python -m prac_fx.report model.py`: where the memory of a training step goes, why, and what would help.

`cli` is the command. `model_file` runs the user's `build()`, `prac_fx.memory_report` analyses the step, and what it
finds is a *document*: plain data, described in `document`, checked by `reading`. `table`, `html` and `png` draw one,
`compare` sets two side by side.
"""

from prac_fx.report.cli import main
from prac_fx.report.document import SCHEMA, Document
from prac_fx.report.reading import check_document, load_document

__all__ = ["SCHEMA", "Document", "check_document", "load_document", "main"]
