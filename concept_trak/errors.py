"""The one exception that means "the user can mend this": printed as a single line, without a
traceback.
"""


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the remedy; the CLI exits with
    status 2.
    """
