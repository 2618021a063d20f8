"""Errors meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message is one line: what, where, and what to do.

    The command line prints it on stderr and leaves with exit code 2; library callers catch it like any exception.
    """


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or infinity. The optimizer that raises it has changed neither parameters nor its state."""
