"""One colour for each category of memory, the same in every picture.

Any two of them are at least 20 apart in CIELAB, also as people with protanopia, deuteranopia and
tritanopia see them (Machado, Oliveira, Fernandes 2009).
"""

from __future__ import annotations

from prac_fx.document.schema import Category

LIGHT: dict[Category, str] = {
    "parameters": "#1a4f92",
    "buffers": "#7e7591",
    "inputs": "#c1c4af",
    "gradients": "#7ce1f0",
    "optimizer": "#91acf5",
    "saved": "#cc6926",
    "state": "#ebbb36",
    "unsharded": "#9f3be0",
    "temporary": "#379067",
    "loss": "#7b174a",
}
DARK: dict[Category, str] = {
    "parameters": "#256298",
    "buffers": "#96829b",
    "inputs": "#c6c9bd",
    "gradients": "#8edbf5",
    "optimizer": "#90a0e6",
    "saved": "#c07514",
    "state": "#f5d04d",
    "unsharded": "#9b30d9",
    "temporary": "#44a375",
    "loss": "#9a285a",
}
