"""Fused kernels for long-tailed (class-imbalanced) deep learning.

``import ltkernels.functional as LF`` gives the functions, :mod:`ltkernels.nn` the modules and
:mod:`ltkernels.margins` the margins, weights and schedules of the published methods.
"""

__version__ = "0.1.0"
