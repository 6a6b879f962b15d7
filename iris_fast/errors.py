"""The one exception that the command line turns into a single line instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend: names what is wrong, where, the value found, and the remedy."""
