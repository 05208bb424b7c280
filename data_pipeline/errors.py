"""What reaches the user as one line: what was asked, the rule, the way out. Entry points print no traceback."""


class UserError(Exception):
    """A failure that its message explains completely."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag, value or name."""

    exit_code = 2


class DataError(UserError):
    """Files that are missing, damaged or not what they should be."""
