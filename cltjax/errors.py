"""The one error that a user can mend."""


class UserError(Exception):
    """A mistake or a fault outside the code: one line saying what is wrong and what to do.

    Entry points print the message and exit with status 2; everything else stays a traceback.
    """
