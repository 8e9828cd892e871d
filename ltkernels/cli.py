"""The command ``ltkernels``: ``doctor`` needs the core only, ``train`` and what else the trainer offers its extras."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata

_USAGE = """usage: ltkernels <command> [options]

  doctor          which backend serves which device, and why
  train RECIPE    train with the reference trainer (pip install ltkernels[trainer]); RECIPE --help shows every field
                  --from RUN/recipe.json repeats the recipe of a run, --resume RUN goes on with a run
  tune digits     repeat the search behind the settings of digits, on validation splits
  posthoc RUN     cRT, tau-normalisation, weight scaling, logit adjustment on the weights of a run
  table NAME      train the runs of a table that are not done yet, --parallel N side by side, and store their results
  report          write the pages of docs/reproduction, reported numbers beside ours, from the stored results
  data            list the data sets that are there, draw their long-tailed versions
  pack TABLE ...  the images of tables in one file a data set, for a machine without network
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(f"ltkernels {_version()}")
        return 0
    if argv[0] == "doctor":
        return doctor()
    missing = [name for name in _trainer_modules() if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"ltkernels {argv[0]}: the trainer needs {', '.join(missing)}. "
            "Install its dependencies with: pip install 'ltkernels[trainer]'",
            file=sys.stderr,
        )
        return 2
    try:
        from ltkernels.trainer import cli  # takes seconds, in which an interrupt may come
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ImportError as error:  # above all an extension that is not built, or for another torch
        print(error, file=sys.stderr)
        return 2
    return cli.main(argv)


def _trainer_modules() -> tuple[str, ...]:
    return ("lightning_fabric", "torchmetrics", "tyro", "rich", "matplotlib", "sklearn", "scipy", "PIL")


def _version() -> str:
    try:
        return metadata.version("ltkernels")
    except metadata.PackageNotFoundError:  # `make build` makes it importable from its folder
        return "of this folder, not installed"


def doctor() -> int:
    """Prints versions, the backend of each device with the reason, and whether a real call ran the kernel it names."""
    import torch

    print(f"ltkernels  {_version()}")
    print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch      {torch.__version__}")
    try:
        from ltkernels import _build_info, _ops
    except (ImportError, OSError) as error:
        print(f"extension  NOT LOADED: {error}")
        return 1
    built = _build_info.description()
    print(f"extension  built against torch {built['torch']}, CPU kernels for {', '.join(built['capabilities'])}")
    forced = " (LTKERNELS_BACKEND)" if "LTKERNELS_BACKEND" in os.environ else ""
    print(f"backend    {_ops.BACKEND}{forced}")
    healthy = _report_device("cpu", _cpu_reason(_ops))
    if torch.cuda.is_available():
        healthy &= _report_device("cuda", f"{torch.cuda.get_device_name()}, {_triton_reason()}")
    else:
        print(f"cuda       none: torch.cuda.is_available() is False; {_triton_reason()}")
    print("others     the definition in plain torch (ltkernels.reference)")
    return 0 if healthy else 1


def _cpu_reason(ops) -> str:
    import torch

    capability = torch.ops.ltkernels.cpu_capability()
    lowered = " set by ATEN_CPU_CAPABILITY" if "ATEN_CPU_CAPABILITY" in os.environ else ""
    return f"capability {capability}{lowered}, {torch.get_num_threads()} threads"


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'ltkernels[triton]')"
    return f"triton {metadata.version('triton')}"


def _report_device(device: str, reason: str) -> bool:
    """Runs small losses on the device, says which kernels served them and whether they agree with the definition."""
    import torch

    from ltkernels import _ops, functional, reference

    if not _ops.uses_kernel(torch.empty(0, device=device)):
        print(f"{device:<10} the definition in plain torch: LTKERNELS_BACKEND=reference")
        return True
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(8, 16, device=device, generator=generator)
    target = torch.arange(8, device=device)
    positive, tau = target ^ 1, torch.full((8,), 0.5, device=device)
    losses = (
        (
            lambda x: functional.margin_cross_entropy(x, target),
            lambda x: reference.margin_softmax(x, target, *[None] * 10, 1.0, 1.0, -1, "mean", -100, 0.0)[0],
        ),
        (
            lambda x: functional.contrastive_loss(x, temperature=tau, positive_index=positive),
            lambda x: reference.contrastive(
                x, None, tau, None, None, positive, *[None] * 6, reference.ALL, True, False, "mean"
            )[0],
        ),
    )
    before, agrees = _ops.kernel_calls(), True
    for loss, definition in losses:
        results = []
        for function in (loss, definition):
            leaf = x.clone().requires_grad_()
            value = function(leaf)
            value.backward()
            results.append((value.detach(), leaf.grad))
        agrees &= all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*results, strict=True))
    ran = [name for name, count in _ops.kernel_calls().items() if count > before.get(name, 0)]
    agrees &= len(ran) >= len(losses)
    print(f"{device:<10} {', '.join(ran) or 'no kernel ran'} ({reason}): {'ok' if agrees else 'WRONG RESULT'}")
    return agrees


if __name__ == "__main__":
    sys.exit(main())
