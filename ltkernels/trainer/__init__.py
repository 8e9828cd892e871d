"""The reference trainer: what ``pip install ltkernels[trainer]`` adds, a user of the public functions and modules.

``cli`` reads the command line, ``recipes`` holds what is trained, ``engine`` trains, ``metrics`` scores, ``report``
writes the run folder.
"""


class TrainerError(ValueError):
    """A mistake the user can put right; the command line prints the message without a traceback."""
