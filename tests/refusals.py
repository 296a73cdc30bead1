"""How tests say that bad input is refused in a sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest


def refuses(kind: type[Exception], message: str) -> Any:
    """Expects an error with exactly this text; fails without one."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")
