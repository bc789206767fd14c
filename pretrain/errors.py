"""What a user can mend: every such error says where, what is wrong, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input, configuration or files; command lines print the message without a traceback."""
