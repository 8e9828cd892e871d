"""The reference trainer: what ``pip install ltkernels[trainer]`` adds, a user of the public functions and modules.

``cli`` reads the command line. The digits example: ``session`` and ``tuning`` are its commands, ``recipes`` holds what
is trained, ``engine`` trains, ``report`` makes tables and pictures. Image classification (CIFAR, Fashion-MNIST):
``image_recipes`` are the typed recipes, ``image_session`` the command, ``methods`` the registry of losses and samplers,
``fit`` the loop, ``step`` one optimiser step, ``checkpoint`` and ``runlog`` what a run leaves behind, ``posthoc`` the
classifiers made of a finished run. Many runs: ``tables`` lists those of each table, ``table_queue`` trains them,
``results`` stores what they found, ``reproduction`` makes pages of it, ``packcommand`` takes the images elsewhere.
``data``, ``models`` and ``papers`` are what they are called; ``metrics`` scores.
"""


class TrainerError(ValueError):
    """A mistake the user can put right; the command line prints the message without a traceback."""
