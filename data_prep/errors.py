"""For imports that are not yet converted: missing or malformed data is what the user must change."""

from __future__ import annotations

from flexlora_ds.errors import UserError as DataError

__all__ = ["DataError"]
