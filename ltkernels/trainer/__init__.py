"""The reference trainer: what ``pip install ltkernels[trainer]`` adds, a user of the public functions and modules.

``cli`` reads the command line, ``session`` and ``tuning`` are its commands, ``recipes`` holds what is trained,
``engine`` trains, ``metrics`` scores, ``report`` makes tables and pictures of it, ``runfolder`` keeps them.
"""


class TrainerError(ValueError):
    """A mistake the user can put right; the command line prints the message without a traceback."""
