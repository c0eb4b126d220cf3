"""How messages spell keys and values, and the rules that values break."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

RULES = {
    "missing": "missing",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "string_type": "must be text in quotes",
    "string_unicode": "must be UTF-8 text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
}


def nearest(word: Any, allowed: Sequence[str]) -> str:
    """A hint at the allowed word that was probably meant, or nothing."""
    found = difflib.get_close_matches(word[:80], allowed, 1) if isinstance(word, str) else []
    return f'; did you mean "{found[0]}"?' if found else ""


def show(value: Any) -> str:
    """A value as TOML would spell it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
